/**
 * The conformance vectors, in the direction of a client: what a server sends is decoded or refused, what a client
 * sends is encoded. With VECTORS_OUT=FILE the encoded frames are written there, for another decoder to judge.
 */

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { test } from "node:test";
import { decode } from "@msgpack/msgpack";
import { ProtocolError } from "../src/errors.js";
import { decodeMessage, encodeMessage, generateFields } from "../src/wire.js";
import { optionsOf } from "./requests.js";

const FOLDER = new URL("../../../vectors/", import.meta.url);
const DEFAULTS = read("defaults.json");
// What only a server's own processes ask and say.
const OWN_FIELDS = {
  stats: ["metrics", "live"],
  accepted: ["tail"],
  delta: ["marks", "queued_ms", "deaths"],
  welcome: ["capacity"],
  hello: ["routes"],
  generate: ["routed"],
};
const isOwn = ({ kind, value }) =>
  kind === "report" ||
  (kind === "stats_request" && Object.keys(value).length > 0) ||
  value?.routes !== undefined ||
  value?.routed !== undefined;
const sent = read("client.json").filter((vector) => vector.expect === "ok" && !isOwn(vector));
const received = read("server.json");

function read(name) {
  return JSON.parse(readFileSync(new URL(name, FOLDER), "utf8"));
}

function bytesOf(frame) {
  if (typeof frame === "string") return Buffer.from(frame, "hex");
  return Buffer.concat(frame.map(([hex, times]) => Buffer.alloc((hex.length / 2) * times, Buffer.from(hex, "hex"))));
}

function isObject(value) {
  return typeof value === "object" && value !== null;
}

/** Vectors write bytes as {"bin": "hex"}. */
function withBytes(value) {
  if (Array.isArray(value)) return value.map(withBytes);
  if (!isObject(value)) return value;
  if (typeof value.bin === "string") return new Uint8Array(Buffer.from(value.bin, "hex"));
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, withBytes(item)]));
}

function withDefaults(kind, value) {
  const whole = { ...DEFAULTS[kind], ...value };
  for (const field of OWN_FIELDS[kind] ?? []) delete whole[field];
  for (const field of ["sampling", "limits", "sampling_defaults", "usage"]) {
    if (whole[field] !== undefined) whole[field] = { ...DEFAULTS[field], ...whole[field] };
  }
  if (whole.messages) whole.messages = whole.messages.map((message) => ({ ...DEFAULTS.chat_message, ...message }));
  if (whole.items) whole.items = whole.items.map((item) => withDefaults("delta", item));
  for (const field of ["logprobs", "prompt_logprobs"]) {
    if (isObject(whole[field])) whole[field] = withBytes({ ...DEFAULTS.logprobs, ...whole[field] });
  }
  if (whole.prompt_u32?.bin) whole.prompt_u32 = new Uint8Array(Buffer.from(whole.prompt_u32.bin, "hex"));
  return whole;
}

for (const vector of received) {
  test(`from a server: ${vector.name}`, () => {
    const frames = vector.frames.map(bytesOf);
    if (vector.kind === "load") {
      assert.equal(decodeMessage(frames), null); // it comes to frontends alone
    } else if (vector.expect === "ok") {
      const { kind, fields } = decodeMessage(frames);
      assert.equal(kind, vector.kind);
      assert.deepStrictEqual(fields, withDefaults(kind, vector.value));
    } else if (vector.expect === "ignore") {
      assert.equal(decodeMessage(frames), null);
    } else {
      assert.throws(() => decodeMessage(frames), ProtocolError);
    }
  });
}

const encoded = {};
for (const { name, kind, value } of sent) {
  test(`from a client: ${name}`, () => {
    const fields = kind === "generate" ? { id: value.id, ...generateFields(optionsOf(value)) } : value;
    const frames = encodeMessage(kind, fields);
    encoded[name] = frames.map((frame) => Buffer.from(frame).toString("hex"));
    assert.equal(String.fromCharCode(...frames[0].subarray(0, 2)), "GG");
    assert.deepStrictEqual(withDefaults(kind, decode(frames[1])), withDefaults(kind, value));
  });
}

test("every vector that a client can send was sent", () => {
  assert.equal(Object.keys(encoded).length, sent.length);
  if (process.env.VECTORS_OUT) writeFileSync(process.env.VECTORS_OUT, JSON.stringify(encoded));
});

test("a seed may be a BigInt, up to what the protocol carries", () => {
  const { sampling } = generateFields({ prompt: "x", seed: 2n ** 53n - 1n });
  assert.deepStrictEqual(decode(encodeMessage("generate", { id: 1, sampling })[1]).sampling, { seed: 2 ** 53 - 1 });
  assert.throws(() => generateFields({ prompt: "x", seed: 2n ** 53n }), RangeError);
  assert.throws(() => generateFields({ prompt: "x", seed: 2 ** 60 }), RangeError);
});

test("what cannot be sent is thrown at once", () => {
  assert.throws(() => generateFields({ prompt: "\ud800" }), TypeError);
  assert.throws(() => generateFields({ prompt: "x", max_tokens: 4 }), /no option max_tokens/);
  assert.throws(() => generateFields({ prompt: [1, -1] }), RangeError);
  assert.throws(() => generateFields({ prompt: [1.5] }), RangeError);
});

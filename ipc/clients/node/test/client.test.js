/** What is particular to this language, against the mock server at SERVER (`graphgen mock-server`). */

import assert from "node:assert/strict";
import { test } from "node:test";
import { Client, ConnectionError, RequestError } from "../index.js";

const address = process.env.SERVER;

async function withClient(use, options = {}) {
  const client = new Client(address, options);
  try {
    await use(client);
  } finally {
    await client.close();
  }
}

test("against the mock server", { skip: address ? false : "set SERVER to its address" }, async (t) => {
  await t.test("pieces come one by one and the end has the counts", () =>
    withClient(async (client) => {
      const stream = client.generate({ prompt: "to be", echoIds: true });
      const texts = [];
      for await (const piece of stream) texts.push(piece.text);
      assert.equal(texts.join(""), "to be");
      assert.deepEqual(stream.finish, ["stop"]);
      assert.deepEqual(stream.usage, { promptTokens: 5, outputTokens: 5, cachedTokens: 0 });
      assert.deepEqual(stream.promptIds, [...Buffer.from("to be")]);
    }));

  await t.test("a signal ends the request and is thrown", () =>
    withClient(async (client) => {
      const controller = new AbortController();
      const stream = client.generate({ prompt: "hang", signal: controller.signal });
      await stream.next();
      controller.abort(new Error("enough"));
      await assert.rejects(async () => {
        for await (const _ of stream);
      }, /enough/);
      while ((await client.stats()).openRequests > 0);
    }));

  await t.test("a signal that is aborted already sends nothing", () =>
    withClient(async (client) => {
      const stream = client.generate({ prompt: "x", signal: AbortSignal.abort(new Error("early")) });
      await assert.rejects(stream.next(), /early/);
    }));

  await t.test("cancel lets the rest come", () =>
    withClient(async (client) => {
      const stream = client.generate({ prompt: "hang" });
      await stream.next();
      stream.cancel();
      const [output] = await stream.outputs();
      assert.equal(output.finish, "aborted");
    }));

  await t.test("errors have a class, a code and advice", () =>
    withClient(async (client) => {
      await assert.rejects(client.generate({ prompt: "overloaded" }).outputs(), (error) => {
        assert.ok(error instanceof RequestError);
        assert.deepEqual([error.code, error.retryable, error.retryAfterMs], ["overloaded", true, 1500]);
        return true;
      });
    }));

  await t.test("a stream that nobody reads does no harm", () =>
    withClient(async (client) => {
      client.generate({ prompt: "error internal" });
      assert.equal((await client.generate({ prompt: "x" }).outputs())[0].text, "x");
    }));

  await t.test("closing ends what is open, and a closed client says so", async () => {
    const client = new Client(address);
    const stream = client.generate({ prompt: "hang" });
    await stream.next();
    await client.close();
    await assert.rejects(stream.outputs(), ConnectionError);
    await assert.rejects(client.generate({ prompt: "x" }).outputs(), /closed/);
  });
});

test("an address where nothing listens is an error at once", () => {
  const client = new Client("tcp://127.0.0.1:1");
  return assert.rejects(client.welcome(), (error) => error.code === "refused" && error.retryable);
});

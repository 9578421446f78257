/**
 * Plays a plan against a running server and prints one line of JSON for each of its steps; the project's tests compare
 * them. `node test/conversation.js PLAN.json`
 */

import { readFileSync } from "node:fs";
import { Client, GraphgenError } from "../index.js";
import { optionsOf } from "./requests.js";

const plan = JSON.parse(readFileSync(process.argv[2], "utf8"));
let draining = () => {};
const notices = [];
const client = new Client(plan.address, {
  curve: plan.curve,
  lostAfterMs: plan.lost_after_ms,
  connectTimeoutMs: plan.connect_timeout_ms,
  onDraining: () => draining(),
  onNotice: (text) => notices.push(text),
});

function told(error) {
  if (!(error instanceof GraphgenError)) throw error;
  return { kind: error.name, code: error.code, retryable: error.retryable, retry_after_ms: error.retryAfterMs };
}

async function read(stream) {
  try {
    const outputs = await stream.outputs();
    return { outputs, prompt_tokens: stream.usage.promptTokens, output_tokens: stream.usage.outputTokens };
  } catch (error) {
    return told(error);
  }
}

async function tell(number, stream) {
  let end = null;
  try {
    for await (const piece of stream) console.log(JSON.stringify({ stream: number, ids: piece.ids }));
  } catch (error) {
    end = told(error);
  }
  console.log(JSON.stringify({ stream: number, end }));
}

const STEPS = {
  /** All at once. */
  async streams({ requests }) {
    return Promise.all(requests.map((request) => read(client.generate(optionsOf(request)))));
  },

  /** All at once; a line for each piece and for each end. */
  async pieces({ requests }) {
    await Promise.all(requests.map((request, stream) => tell(stream, client.generate(optionsOf(request)))));
    return {};
  },

  /** Leaves the loop after some pieces. */
  async cancel({ request, after }) {
    let pieces = 0;
    for await (const _ of client.generate(optionsOf(request))) if (++pieces === after) break;
    return { pieces };
  },

  /** Says on a line of its own that the stream runs, then waits for the server to drain. */
  async drain({ request }) {
    const stream = client.generate(optionsOf(request));
    const first = await stream.next();
    const drained = new Promise((resolve) => (draining = resolve));
    console.log(JSON.stringify({ running: true }));
    await drained;
    const refused = await read(client.generate(optionsOf(request)));
    const rest = await read(stream);
    rest.outputs[0].text = first.value.text + rest.outputs[0].text;
    return { refused, rest };
  },

  async notices() {
    return { notices };
  },

  async stats() {
    return { open_requests: (await client.stats()).openRequests };
  },

  async health() {
    return { ready: (await client.health()).ready };
  },

  async pause({ ms }) {
    return new Promise((resolve) => setTimeout(() => resolve({}), ms));
  },
};

for (const step of plan.steps) {
  console.log(JSON.stringify(await STEPS[step.do](step).catch(told)));
}
await client.close();

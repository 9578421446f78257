// OpenAI's own package. Arguments: base URL, model. Prints what came of each call as one line of JSON.
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
let requests = 0;
const counted = (...call) => {
  requests += 1;
  return fetch(...call);
};
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 2, fetch: counted });
const asked = { model, messages: [{ role: "user", content: "Good morrow" }], max_tokens: 24, temperature: 0 };

const whole = await client.chat.completions.create(asked);

let streamed = "";
let finish = null;
let usage = null;
const stream = await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  finish = chunk.choices[0]?.finish_reason ?? finish;
  usage = chunk.usage ?? usage;
}

const completion = await client.completions.create({ model, prompt: "ROMEO:", max_tokens: 8, temperature: 0 });
const response = await client.responses.create({
  model,
  input: asked.messages,
  max_output_tokens: 24,
  temperature: 0,
});

// The error of a call, and how often the package asked.
async function failure(call) {
  const before = requests;
  try {
    await call();
    return null;
  } catch (error) {
    return { kind: error.constructor.name, code: error.code, param: error.param, requests: requests - before };
  }
}
const wrong = await failure(() => client.chat.completions.create({ ...asked, temperature: -1 }));
const unknown = await failure(() => client.chat.completions.create({ ...asked, model: "gpt" }));
const late = await failure(() => client.chat.completions.create({ ...asked, deadline_ms: 0.001 }));

const endless = { ...asked, max_tokens: 600, ignore_eos: true };
const left = await client.chat.completions.create({ ...endless, stream: true });
for await (const chunk of left) {
  if (chunk.choices[0]?.delta.content) break; // which closes the connection
}
const controller = new AbortController();
setTimeout(() => controller.abort(), 300);
const aborted = await failure(() => client.chat.completions.create(endless, { signal: controller.signal }));

console.log(
  JSON.stringify({
    whole: whole.choices[0].message.content,
    streamed,
    finish,
    usage: usage.completion_tokens,
    completion: completion.choices[0].text,
    response: response.output_text,
    wrong,
    unknown,
    late,
    aborted,
  }),
);

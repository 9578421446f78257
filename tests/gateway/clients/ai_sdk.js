// The AI SDK. Arguments: base URL, model. Prints what came of each call as one line of JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [baseURL, name] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "graphgen", baseURL, apiKey: "none", includeUsage: true });
const asked = { prompt: "Good morrow", maxOutputTokens: 24, temperature: 0 };

const whole = await generateText({ ...asked, model: provider(name) });

const stream = streamText({ ...asked, model: provider(name) });
let streamed = "";
for await (const text of stream.textStream) streamed += text;

async function failure(call) {
  try {
    await call();
    return null;
  } catch (error) {
    return { name: error.name, status: error.statusCode };
  }
}

console.log(
  JSON.stringify({
    whole: whole.text,
    finish: whole.finishReason,
    usage: whole.usage.outputTokens,
    streamed,
    streamedFinish: await stream.finishReason,
    streamedUsage: (await stream.usage).outputTokens,
    unknown: await failure(() => generateText({ ...asked, model: provider("gpt") })),
    wrong: await failure(() => generateText({ ...asked, temperature: -1, model: provider(name) })),
  }),
);

/** Prints text as it comes from a running server. `node example.js "To be, or" [tcp://127.0.0.1:5755]` */

import { Client, GraphgenError } from "./index.js";

const [prompt = "ROMEO:\n", address] = process.argv.slice(2);
const client = new Client(address);
try {
  const stream = client.generate({ prompt, maxTokens: 80 });
  for await (const piece of stream) process.stdout.write(piece.text);
  console.log(`\n${stream.usage.outputTokens} tokens, ${stream.finish[0]}`);
} catch (error) {
  if (!(error instanceof GraphgenError)) throw error;
  console.error(error.message + (error.retryable ? " (try again)" : ""));
  process.exitCode = 1;
} finally {
  await client.close();
}

/**
 * The output of one request, as an async iterator of pieces.
 *
 * Owns what has come and was not read yet, the check that no token is missing, and cancelling. Made by client.js, fed
 * by connection.js.
 */

import { ProtocolError } from "./errors.js";
import { camelKeys, generateFields, readLogprobs } from "./wire.js";

export class Stream {
  #fields;
  #connect; // () => Promise<Connection>
  #connection = null;
  #id = null;
  #pieces = [];
  #wake = null; // of the reader that waits
  #error = null;
  #ended = false;
  #left = false; // the reader is gone: what still comes is dropped
  #begun = false;
  #repeated = false;
  #counts = new Map(); // sample -> tokens so far
  #signal;
  #onAbort = () => this.#abort();

  /** Length of the prompt, once the server has accepted it. */
  promptTokens = null;
  /** With `echoIds`: the prompt's token ids. */
  promptIds = null;
  /** At the end: how each sample ended, token counts, milliseconds. */
  finish = null;
  usage = null;
  timing = null;

  /** Throws at once for options that cannot be sent. */
  constructor(options, connect) {
    this.#fields = generateFields(options);
    this.#connect = connect;
    this.#signal = options.signal;
    if (this.#signal?.aborted) {
      this.#fail(this.#signal.reason);
    } else {
      this.#signal?.addEventListener("abort", this.#onAbort, { once: true });
      this.#start();
    }
  }

  [Symbol.asyncIterator]() {
    return this;
  }

  async next() {
    for (;;) {
      if (this.#pieces.length > 0) return { done: false, value: this.#pieces.shift() };
      if (this.#error !== null) {
        const error = this.#error;
        this.#error = null; // an iterator throws once, and is done then
        throw error;
      }
      if (this.#ended) return { done: true, value: undefined };
      await new Promise((resolve) => (this.#wake = resolve));
    }
  }

  /** What `break` calls. */
  async return() {
    this.#leave();
    return { done: true, value: undefined };
  }

  /** Ends the request; the pieces that were on their way still come, the last one with finish `aborted`. */
  cancel() {
    if (this.#id !== null) this.#connection.cancel(this.#id);
    else if (!this.#ended) this.#end(); // never sent
  }

  /** Reads to the end. @returns {Promise<import("../index.js").Output[]>} one for each sample */
  async outputs() {
    const outputs = [];
    for await (const piece of this) {
      const output = (outputs[piece.sample] ??= { text: "", ids: [], finish: null, logprobs: null, promptLogprobs: null });
      output.text += piece.text;
      output.ids.push(...piece.ids);
      if (piece.logprobs !== null) output.logprobs = [...(output.logprobs ?? []), ...piece.logprobs];
      output.promptLogprobs ??= piece.promptLogprobs;
      output.finish = piece.finish;
    }
    return outputs;
  }

  async #start() {
    try {
      this.#connection = await this.#connect();
      if (!this.#ended) this.#id = this.#connection.request(this.#fields, this.#handler());
    } catch (error) {
      this.#fail(error);
    }
  }

  #handler() {
    return {
      accepted: (message) => {
        this.#begun = true;
        this.promptTokens = message.prompt_tokens;
        this.promptIds = message.prompt_ids;
      },
      delta: (message) => this.#take(message),
      done: (message) => {
        this.finish = message.finish;
        this.usage = camelKeys(message.usage);
        this.timing = camelKeys(message.timing);
        this.#end();
      },
      failed: (error) => {
        this.#id = null;
        // Nothing of it was ever done, so it is asked again, of the server that is there now.
        if (error.code === "no_session" && !this.#begun && !this.#repeated && !this.#ended) {
          this.#repeated = true;
          this.#start();
        } else {
          this.#fail(error);
        }
      },
    };
  }

  #take(delta) {
    const { seq, sample, ids, text, finish, logprobs, prompt_logprobs: ofPrompt } = delta;
    const count = this.#counts.get(sample) ?? 0;
    if (seq !== count) {
      this.cancel();
      this.#fail(new ProtocolError(`sample ${sample} had ${count} tokens and goes on at ${seq}`));
    }
    this.#counts.set(sample, count + ids.length);
    if (this.#left || this.#ended) return;
    try {
      this.#pieces.push({
        text,
        ids,
        sample,
        finish,
        logprobs: logprobs && readLogprobs(logprobs, ids),
        promptLogprobs: ofPrompt && readLogprobs(ofPrompt, ofPrompt.ids),
      });
    } catch (error) {
      this.cancel();
      this.#fail(error);
    }
    this.#wake?.();
  }

  #leave() {
    this.#left = true;
    this.#pieces.length = 0;
    this.cancel();
    this.#end();
  }

  #abort() {
    this.#leave();
    this.#error = this.#signal.reason;
  }

  #fail(error) {
    if (this.#ended) return;
    this.#error = error;
    this.#end();
  }

  #end() {
    this.#ended = true;
    this.#signal?.removeEventListener("abort", this.#onAbort);
    this.#wake?.();
  }
}

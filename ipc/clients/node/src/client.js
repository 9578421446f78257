/**
 * The public class. Owns the connection of the moment: the first call opens it, and a call after its loss opens
 * another one.
 */

import { Connection } from "./connection.js";
import { ConnectionError } from "./errors.js";
import { Stream } from "./stream.js";
import { camelKeys } from "./wire.js";

export class Client {
  #address;
  #options;
  #connection = null;
  #wasThere = false; // the server, once
  #closed = false;

  /**
   * Does not connect yet.
   * @param {string} [address]
   * @param {import("../index.js").ClientOptions} [options]
   */
  constructor(address = "tcp://127.0.0.1:5755", options = {}) {
    this.#address = address;
    this.#options = options;
  }

  /**
   * @param {import("../index.js").GenerateOptions} options
   * @returns {Stream}
   */
  generate(options) {
    return new Stream(options, () => this.#connected());
  }

  /** What the server says of itself: model, limits, features. */
  async welcome() {
    return camelKeys((await this.#connected()).welcome);
  }

  async stats() {
    return camelKeys(await (await this.#connected()).ask("stats"));
  }

  /** After a round trip through the server's scheduler and worker. */
  async health() {
    return camelKeys(await (await this.#connected()).ask("health"));
  }

  /** Ends what is open. Node ends only when every client is closed. */
  async close() {
    this.#closed = true;
    await this.#connection?.close();
  }

  async [Symbol.asyncDispose ?? Symbol.for("Symbol.asyncDispose")]() {
    await this.close();
  }

  async #connected() {
    if (this.#closed) throw new ConnectionError("closed", "the client was closed: make a new one");
    if (this.#connection === null || this.#connection.ended) {
      this.#connection = new Connection(this.#address, this.#options, this.#wasThere);
    }
    const connection = await this.#connection.ready;
    this.#wasThere = true;
    return connection;
  }
}

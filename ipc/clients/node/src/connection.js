/**
 * One DEALER socket and the session on it, from `hello` to the end of either.
 *
 * Owns the socket, the order of what is sent, the table of open requests, and the decision that a server is gone. A
 * connection that has ended stays so: its owner, the Client, opens another one. Knows nothing of texts: messages go to
 * the handler of their request.
 */

import { Dealer } from "zeromq";
import { ConnectionError, GraphgenError, ProtocolError, RequestError } from "./errors.js";
import { decodeMessage, encodeMessage } from "./wire.js";

const NAME = "graphgen-node/0.1";
const MAJOR = 1;
/** Silent for so many heartbeats, a server is asked whether it lives. */
const PATIENCE_HEARTBEATS = 3;
/** How long a server may refuse connections before there is none: one that is about to listen does so by then. */
const REFUSED_MS = 500;
/** What was sent last may still go out for so long after close(). */
const LINGER_MS = 200;

export class Connection {
  #socket;
  #outbox = [];
  #sending = null;
  #nextId = 1;
  #open = new Map(); // id -> handler: {accepted, delta, done, failed}
  #asked = { stats: [], health: [] }; // who waits for which answer, in order
  #timer = null;
  #refused = null; // runs since nobody listened at the address
  #lastHeardMs = 0;
  #lastTickMs = 0;
  #lostAfterMs;
  #onDraining;
  #onNotice;
  #welcomed = Promise.withResolvers?.() ?? withResolvers();

  /** The server's `welcome`, once `ready` is resolved. */
  welcome = null;
  /** Why it ended, or null. */
  ended = null;

  /**
   * @param {string} address
   * @param {import("../index.js").ClientOptions} options
   * @param {boolean} wasThere a server answered there before: it may be starting again
   */
  constructor(address, options, wasThere) {
    const { curve, connectTimeoutMs = 10_000, lostAfterMs = 10_000, onDraining, onNotice } = options;
    this.#lostAfterMs = lostAfterMs;
    this.#onDraining = onDraining;
    this.#onNotice = onNotice;
    this.#socket = new Dealer({
      linger: LINGER_MS,
      sendHighWaterMark: 0, // the server's limits bound what is open; waiting here would hold up cancels
      receiveHighWaterMark: 0,
      ...(curve && {
        curveServerKey: curve.serverKey,
        curvePublicKey: curve.publicKey,
        curveSecretKey: curve.secretKey,
      }),
    });
    if (!wasThere) this.#watchRefusals(address);
    this.#socket.connect(address);
    const giveUp = setTimeout(
      () => this.#end(this.#refused ? refusal(address) : new ConnectionError("timeout",
          `no welcome from ${address} within ${connectTimeoutMs} ms: ` +
          "is the server running, and is this client's key let in?", { retryable: true })),
      connectTimeoutMs,
    );
    this.ready = this.#welcomed.promise.finally(() => clearTimeout(giveUp));
    this.ready.catch(() => {}); // whoever awaits it is told
    this.#receive();
    this.#send("hello", {
      versions: [MAJOR, MAJOR],
      client: NAME,
      notices: onNotice ? true : undefined,
      batches: true,
    });
  }

  /**
   * Sends a `generate`. The handler hears of it until `done` or `failed`, whatever happens.
   * @returns {number} its id
   * @throws {ConnectionError} why the connection has ended
   * @throws {RequestError} too_large: such a frame would end the connection, and with it all that is open
   */
  request(fields, handler) {
    if (this.ended) throw this.ended;
    const id = this.#nextId++;
    const frames = encodeMessage("generate", { id, ...fields });
    const limit = this.welcome.limits.frame_bytes;
    if (frames[1].length > limit) {
      throw new RequestError("too_large",
        `the request takes ${frames[1].length} bytes, the server's limit is ${limit}: shorten it`);
    }
    this.#open.set(id, handler);
    this.#watch();
    this.#sendFrames(frames);
    return id;
  }

  cancel(id) {
    if (this.#open.has(id)) this.#send("cancel", { id });
  }

  /** @param {"stats" | "health"} what */
  ask(what) {
    if (this.ended) return Promise.reject(this.ended);
    return new Promise((resolve, reject) => {
      this.#asked[what].push({ resolve, reject });
      this.#watch();
      this.#send(`${what}_request`);
    });
  }

  /** Ends the session; the server cancels what is open. */
  async close() {
    if (this.ended) return;
    if (this.welcome) {
      this.#send("bye");
      await Promise.race([this.#sending, new Promise((resolve) => setTimeout(resolve, LINGER_MS))]);
    }
    this.#end(new ConnectionError("closed", "the client was closed"));
  }

  #send(kind, fields) {
    this.#sendFrames(encodeMessage(kind, fields));
  }

  #sendFrames(frames) {
    this.#outbox.push(frames);
    this.#sending ??= this.#drainOutbox(); // a socket takes one message at a time
  }

  /** libzmq tries again for ever where nobody listens, which is most often a server that was not started. */
  #watchRefusals(address) {
    this.#socket.events.on("connect:retry", () => {
      if (this.welcome === null && !this.ended) {
        this.#refused ??= setTimeout(() => this.#end(refusal(address)), REFUSED_MS);
      }
    });
    this.#socket.events.on("connect", () => {
      clearTimeout(this.#refused);
      this.#refused = null;
    });
  }

  async #drainOutbox() {
    try {
      while (this.#outbox.length > 0) await this.#socket.send(this.#outbox.shift());
    } catch (error) {
      this.#end(new ConnectionError("lost", error.message, { retryable: true }));
    } finally {
      this.#sending = null;
    }
  }

  async #receive() {
    try {
      for await (const frames of this.#socket) {
        this.#lastHeardMs = Date.now();
        const message = decodeMessage(frames);
        if (message !== null) this.#take(message);
      }
    } catch (error) {
      const lost = error instanceof GraphgenError;
      this.#end(lost ? error : new ConnectionError("lost", error.message, { retryable: true }));
    }
  }

  #take({ kind, fields }) {
    switch (kind) {
      case "welcome":
        this.welcome = fields;
        this.#welcomed.resolve(this);
        break;
      case "accepted":
      case "delta":
        this.#open.get(fields.id)?.[kind](fields);
        break;
      case "deltas":
        for (const delta of fields.items) this.#open.get(delta.id)?.delta(delta);
        break;
      case "done":
        this.#finish(fields.id)?.done(fields);
        break;
      case "error":
        this.#takeError(fields);
        break;
      case "ping":
        this.#checkInstance(fields);
        this.#send("pong", { t: fields.t });
        break;
      case "pong":
        this.#checkInstance(fields);
        break;
      case "draining":
        this.#onDraining?.(fields.grace_ms);
        break;
      case "notice":
        this.#onNotice?.(fields.text);
        break;
      default: // stats, health
        this.#asked[kind].shift()?.resolve(fields);
        this.#watch();
    }
  }

  #takeError(fields) {
    const error = RequestError.from(fields);
    if (fields.code === "no_session") {
      this.#lose("the server does not know the session: it was restarted", "no_session");
    } else if (fields.id !== null) {
      this.#finish(fields.id)?.failed(error);
    } else if (this.welcome === null) {
      this.#end(error); // of hello: unsupported_version
    } else if (fields.about === "stats_request" || fields.about === "health_request") {
      this.#asked[fields.about.replace("_request", "")].shift()?.reject(error);
    }
    // Any other error without an id ends nothing.
  }

  #checkInstance({ instance }) {
    if (instance !== "" && this.welcome !== null && instance !== this.welcome.instance) {
      this.#lose("another server answers at the address", "no_session");
    }
  }

  #finish(id) {
    const handler = this.#open.get(id);
    this.#open.delete(id);
    this.#watch();
    return handler;
  }

  /** The heartbeat runs while something is open, as the server's does. */
  #watch() {
    const busy = this.#open.size > 0 || this.#asked.stats.length > 0 || this.#asked.health.length > 0;
    if (busy && this.#timer === null && !this.ended) {
      this.#lastHeardMs = this.#lastTickMs = Date.now();
      this.#timer = setInterval(() => this.#tick(), this.welcome.heartbeat_ms);
    } else if (!busy && this.#timer !== null) {
      clearInterval(this.#timer);
      this.#timer = null;
    }
  }

  #tick() {
    const nowMs = Date.now();
    const heartbeatMs = this.welcome.heartbeat_ms;
    if (nowMs - this.#lastTickMs > 2 * heartbeatMs) this.#lastHeardMs = nowMs; // this program stood still, not the server
    this.#lastTickMs = nowMs;
    const silentMs = nowMs - this.#lastHeardMs;
    if (silentMs > this.#lostAfterMs) this.#lose(`the server was silent for ${silentMs} ms`, "lost");
    else if (silentMs > PATIENCE_HEARTBEATS * heartbeatMs) this.#send("ping", { t: nowMs });
  }

  #lose(message, code) {
    this.#end(new ConnectionError(code, message, { retryable: true }));
  }

  #end(error) {
    if (this.ended) return;
    this.ended = error;
    clearInterval(this.#timer);
    clearTimeout(this.#refused);
    this.#outbox.length = 0;
    this.#welcomed.reject(error);
    this.#socket.close();
    const handlers = [...this.#open.values()];
    const asked = [...this.#asked.stats, ...this.#asked.health];
    this.#open.clear();
    for (const handler of handlers) handler.failed(error);
    for (const { reject } of asked) reject(error);
  }
}

function refusal(address) {
  const advice = "start a server there with `graphgen serve`, or give the address of one that runs";
  return new ConnectionError("refused", `nothing listens at ${address}: ${advice}`, { retryable: true });
}

/** Promise.withResolvers, which Node has from version 22 on. */
function withResolvers() {
  let resolve, reject;
  const promise = new Promise((yes, no) => ([resolve, reject] = [yes, no]));
  return { promise, resolve, reject };
}

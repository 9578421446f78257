/**
 * What can go wrong. Owns the error classes; thrown by the other modules.
 *
 * GraphgenError
 * ├── RequestError      the server refused or ended a request; `code` is one of PROTOCOL.md's
 * ├── ConnectionError   there is no server, it fell silent, or the session is gone; `code` says which
 * └── ProtocolError     the server sent what no server may send
 */

export class GraphgenError extends Error {
  /**
   * @param {string} code
   * @param {string} message
   * @param {{retryable?: boolean, retryAfterMs?: number | null}} [advice]
   */
  constructor(code, message, { retryable = false, retryAfterMs = null } = {}) {
    super(`${code}: ${message}`);
    this.name = new.target.name;
    this.code = code;
    this.retryable = retryable;
    this.retryAfterMs = retryAfterMs;
  }
}

export class RequestError extends GraphgenError {
  /** Of an `error` message. A code that is not known here is passed on; `retryable` says what matters. */
  static from(message) {
    return new RequestError(message.code, message.message, {
      retryable: message.retryable,
      retryAfterMs: message.retry_after_ms,
    });
  }
}

export class ConnectionError extends GraphgenError {}

export class ProtocolError extends GraphgenError {
  constructor(message) {
    super("protocol", message);
  }
}

/**
 * Messages to frames and back. Owns the kinds, the fields of what a server sends, and how a caller's options become a
 * `generate`. Never touches a socket. Called by connection.js and stream.js.
 */

import { ProtocolError } from "./errors.js";
import { Float, decodeMap, encodeMap, isMap } from "./msgpack.js";

const MAJOR = 1;
const MAX_TOKEN_ID = 2 ** 31 - 1;

const CLIENT_KINDS = {
  hello: "H",
  generate: "G",
  cancel: "X",
  stats_request: "S",
  health_request: "L",
  bye: "B",
  ping: "P",
  pong: "Q",
};

// --- types of fields: from the decoded value to the value, or a throw ------------------------------------------

function wrong(expected, value) {
  throw new Error(`expected ${expected}, got ${value instanceof Float ? `float ${value.value}` : JSON.stringify(value)}`);
}

function int(value) {
  return Number.isSafeInteger(value) && value >= 0 ? value : wrong("int, 0 to 2^53-1", value);
}

function tokenId(value) {
  return Number.isSafeInteger(value) && value >= 0 && value <= MAX_TOKEN_ID ? value : wrong("int, 0 to 2^31-1", value);
}

function float(value) {
  const number = value instanceof Float ? value.value : value;
  const inRange = typeof number === "number" && number >= 0 && number <= Number.MAX_SAFE_INTEGER; // NaN is not
  return inRange ? number : wrong("float, 0 to 2^53-1", value);
}

function str(value) {
  return typeof value === "string" ? value : wrong("str", value);
}

function bool(value) {
  return typeof value === "boolean" ? value : wrong("bool", value);
}

function bytes(value) {
  return value instanceof Uint8Array ? Uint8Array.from(value) : wrong("bin", value);
}

function upTo(most) {
  return (value) => (int(value) <= most ? value : wrong(`int, 0 to ${most}`, value));
}

function list(item) {
  return (value) => (Array.isArray(value) ? value.map(item) : wrong("array", value));
}

function orNil(type) {
  return (value) => (value === null ? null : type(value));
}

function optional(type, fallback) {
  return Object.assign((value) => type(value), { fallback });
}

function map(fields) {
  return (value) => (isMap(value) ? readFields(fields, value) : wrong("map", value));
}

/** Every field, by its default where it is absent; unknown keys are left out. */
function readFields(fields, found) {
  const message = {};
  for (const [name, type] of Object.entries(fields)) {
    if (Object.hasOwn(found, name)) {
      try {
        message[name] = type(found[name]);
      } catch (error) {
        throw new Error(`${name}: ${error.message}`);
      }
    } else if ("fallback" in type) {
      message[name] = type.fallback;
    } else {
      throw new Error(`${name}: a required field is missing`);
    }
  }
  return message;
}

const ENGINE = {
  serves: bool,
  running: int,
  waiting: int,
  pages_free: int,
  pages_total: int,
  steps: int,
  finished: int,
  preemptions: int,
  worker_restarts: int,
};

const LIMITS = {
  frame_bytes: int,
  prompt_tokens: int,
  text_bytes: int,
  open_requests: int,
  open_prompt_tokens: int,
  messages: optional(int, 1024),
  samples: optional(int, 16),
  stop_strings: optional(int, 16),
  stop_string_len: optional(int, 1024),
  stop_token_ids: optional(int, 16),
  deadline_ms: optional(int, 3_600_000),
};
const SAMPLING_DEFAULTS = {
  temperature: optional(float, 1),
  top_k: optional(int, 0),
  top_p: optional(float, 1),
  min_p: optional(float, 0),
  repetition_penalty: optional(float, 1),
};
const USAGE = { prompt_tokens: int, output_tokens: int, cached_tokens: optional(int, 0) };
const TIMING = { queued_ms: float, first_token_ms: float, total_ms: float };
const LOGPROBS = {
  top: optional(upTo(20), 0),
  values: optional(bytes, new Uint8Array()),
  tokens: optional(list(bytes), []),
  ids: optional(list(tokenId), []),
  before: optional(bytes, new Uint8Array()),
};
const DELTA = {
  id: int,
  seq: optional(int, 0),
  sample: optional(int, 0),
  ids: optional(list(tokenId), []),
  text: optional(str, ""),
  finish: optional(orNil(str), null),
  cached_tokens: optional(int, 0),
  logprobs: optional(orNil(map(LOGPROBS)), null),
  prompt_logprobs: optional(orNil(map(LOGPROBS)), null),
};
const PING = { t: optional(int, 0), instance: optional(str, "") };

const SERVER_KINDS = {
  W: [
    "welcome",
    {
      version: int,
      session: str,
      instance: str,
      server: str,
      model: str,
      vocab_size: int,
      eos_token_ids: list(tokenId),
      features: list(str),
      limits: map(LIMITS),
      heartbeat_ms: int,
      slow_consumer_ms: int,
      control: str,
      sampling_defaults: optional(map(SAMPLING_DEFAULTS), readFields(SAMPLING_DEFAULTS, {})),
      draining: optional(bool, false),
      frontends: optional(list(str), []),
    },
  ],
  A: ["accepted", { id: int, prompt_tokens: int, prompt_ids: optional(orNil(list(tokenId)), null), prompt_text: optional(orNil(str), null) }],
  D: ["delta", DELTA],
  U: ["deltas", { items: list(map(DELTA)) }],
  F: ["done", { id: int, finish: list(str), usage: map(USAGE), timing: map(TIMING) }],
  E: [
    "error",
    {
      code: str,
      message: str,
      retryable: optional(bool, false),
      retry_after_ms: optional(orNil(int), null),
      id: optional(orNil(int), null),
      about: optional(str, ""),
      versions: optional(orNil(list(int)), null),
    },
  ],
  N: ["draining", { grace_ms: int }],
  I: ["notice", { text: str }],
  T: [
    "stats",
    {
      sessions: int,
      open_requests: int,
      held_requests: int,
      running: int,
      waiting: int,
      pages_free: int,
      pages_total: int,
      steps: int,
      finished: int,
      preemptions: int,
      step_ms_p50: float,
      step_ms_p95: float,
      step_ms_p99: float,
      step_ms_max: float,
      deltas_sent: int,
      deltas_merged: int,
      messages_refused: int,
      frontend_cpu_s: float,
      frontend_rss_bytes: int,
      worker_restarts: optional(int, 0),
      worker_loss: optional(str, ""),
      poisoned: optional(int, 0),
      numerical_errors: optional(int, 0),
      engines: optional(list(map(ENGINE)), []),
    },
  ],
  M: ["health", { status: str, ready: bool, worker_ms: float }],
  P: ["ping", PING],
  Q: ["pong", PING],
};

/**
 * What a map of log-probabilities says of each token.
 * @returns {import("../index.js").Logprob[]}
 * @throws {ProtocolError} where they are not those of so many tokens
 */
export function readLogprobs({ top, values, tokens }, ids) {
  const size = 8 + 8 * top;
  if (values.length !== size * ids.length || tokens.length !== (1 + top) * ids.length) {
    throw new ProtocolError(`log-probabilities of other tokens than the ${ids.length} they came with`);
  }
  const view = new DataView(values.buffer, values.byteOffset, values.byteLength);
  return ids.map((id, place) => {
    const start = size * place;
    const first = (1 + top) * place;
    const likeliest = Array.from({ length: top }, (_, number) => ({
      id: view.getUint32(start + 8 + 4 * number, true),
      logprob: view.getFloat32(start + 8 + 4 * (top + number), true),
      token: tokens[first + 1 + number],
    }));
    const own = { id, logprob: view.getFloat32(start, true), token: tokens[first] };
    return { ...own, rank: view.getUint32(start + 4, true), top: likeliest };
  });
}

// --- frames ----------------------------------------------------------------------------------------------------

/**
 * @param {keyof typeof CLIENT_KINDS} kind
 * @param {Record<string, unknown>} fields
 * @returns {[Uint8Array, Uint8Array]} header and map
 */
export function encodeMessage(kind, fields = {}) {
  return [Uint8Array.of(0x47, 0x47, MAJOR, CLIENT_KINDS[kind].charCodeAt(0)), encodeMap(fields)];
}

/**
 * @param {Uint8Array[]} frames
 * @returns {{kind: string, fields: any} | null} null: a kind that is not known here, to be ignored
 * @throws {ProtocolError}
 */
export function decodeMessage(frames) {
  const [header, body] = frames;
  if (frames.length !== 2) throw new ProtocolError(`a message has ${frames.length} frames, not 2`);
  if (header.length !== 4 || header[0] !== 0x47 || header[1] !== 0x47) {
    throw new ProtocolError(`the first frame is no header: ${Buffer.from(header).subarray(0, 16).toString("hex")}`);
  }
  if (header[2] !== MAJOR) throw new ProtocolError(`version ${header[2]} of the protocol, expected ${MAJOR}`);
  const known = SERVER_KINDS[String.fromCharCode(header[3])];
  if (known === undefined) return null;
  const [kind, fields] = known;
  try {
    return { kind, fields: readFields(fields, decodeMap(body)) };
  } catch (error) {
    throw new ProtocolError(`${kind}: ${error.message}`);
  }
}

// --- a caller's options ----------------------------------------------------------------------------------------

const SAMPLING_FIELDS = [
  "max_tokens",
  "min_tokens",
  "temperature",
  "top_k",
  "top_p",
  "min_p",
  "repetition_penalty",
  "presence_penalty",
  "frequency_penalty",
  "logit_bias",
  "seed",
  "stop",
  "stop_token_ids",
  "ignore_eos",
  "skip_special_tokens",
  "n",
  "priority",
  "deadline_ms",
  "itl_target_ms",
  "ttft_target_ms",
  "tpot_target_ms",
  "cache_salt",
  "structured",
  "logprobs",
  "prompt_logprobs",
  "model_defaults",
];
const SAMPLING_OPTIONS = new Map(SAMPLING_FIELDS.map((field) => [camelCase(field), field]));

/**
 * The fields of a `generate` without its id. Throws TypeError or RangeError for options that cannot be sent; the
 * server checks all others.
 * @param {import("../index.js").GenerateOptions} options
 */
export function generateFields(options) {
  const { prompt, messages, tools, documents, chatTemplateKwargs, tenant, stream, echoIds, signal, ...rest } = options;
  const sampling = {};
  for (const [option, value] of Object.entries(rest)) {
    const field = SAMPLING_OPTIONS.get(option);
    if (field === undefined) throw new TypeError(`there is no option ${option}: see GenerateOptions`);
    if (value !== undefined) sampling[field] = sendable(option, value);
  }
  if (typeof sampling.stop === "string") sampling.stop = [sampling.stop];
  return {
    ...promptFields(prompt),
    messages: messages?.map((message) => sendable("messages", messageFields(message))),
    tools: sendable("tools", tools),
    documents: sendable("documents", documents),
    chat_template_kwargs: sendable("chatTemplateKwargs", chatTemplateKwargs),
    tenant: sendable("tenant", tenant),
    sampling: Object.keys(sampling).length > 0 ? sampling : undefined,
    stream,
    echo_ids: echoIds,
  };
}

/** What the protocol knows of a message: of a program's own object it may be a part. */
function messageFields({ role, content, name, toolCalls, toolCallId, reasoningContent }) {
  return {
    role,
    content,
    name,
    tool_calls: toolCalls,
    tool_call_id: toolCallId,
    reasoning_content: reasoningContent,
  };
}

function promptFields(prompt) {
  if (prompt === undefined) return {};
  if (typeof prompt === "string") return { text: sendable("prompt", prompt) };
  const ids = Array.from(prompt);
  for (const id of ids) {
    if (!Number.isInteger(id) || id < 0 || id > MAX_TOKEN_ID) {
      throw new RangeError(`prompt: ${id} is no token id: give integers from 0 to ${MAX_TOKEN_ID}`);
    }
  }
  if (!(prompt instanceof Uint32Array)) return { prompt_ids: ids };
  const packed = Buffer.alloc(4 * ids.length);
  ids.forEach((id, place) => packed.writeUInt32LE(id, 4 * place));
  return { prompt_u32: packed };
}

/** The value as it goes on the wire: a BigInt as the integer it is, text only if it can be written as UTF-8. */
function sendable(name, value) {
  if (typeof value === "bigint" || (Number.isInteger(value) && !Number.isSafeInteger(value))) {
    const number = Number(value);
    if (Number.isSafeInteger(number)) return number;
    throw new RangeError(`${name}: ${value} has more digits than the protocol carries: the limit is 2^53-1`);
  }
  if (typeof value === "string" && !value.isWellFormed()) {
    throw new TypeError(`${name}: the text holds half a surrogate pair: apply toWellFormed() to it`);
  }
  if (Array.isArray(value)) return value.map((item) => sendable(name, item));
  if (isMap(value)) return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, sendable(name, item)]));
  return value;
}

/** `prompt_tokens` as `promptTokens`. */
export function camelCase(name) {
  return name.replace(/_([a-z0-9])/g, (_, letter) => letter.toUpperCase());
}

/** The same for the keys of a message, those of maps within it and within its arrays too. */
export function camelKeys(fields) {
  return Object.fromEntries(Object.entries(fields).map(([key, value]) => [camelCase(key), camelItems(value)]));
}

function camelItems(value) {
  if (Array.isArray(value)) return value.map(camelItems);
  return isMap(value) ? camelKeys(value) : value;
}

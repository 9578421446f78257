/** A CURVE connection; each key is 40 characters, as `graphgen keys` prints it. */
export interface CurveKeys {
  serverKey: string;
  publicKey: string;
  secretKey: string;
}

export interface ClientOptions {
  curve?: CurveKeys;
  /** For the server's welcome. Default 10000. */
  connectTimeoutMs?: number;
  /** Open requests are given up when the server was silent for so long. Default 10000. */
  lostAfterMs?: number;
  /** The server is about to end; open requests go on for so long. */
  onDraining?: (graceMs: number) => void;
  /** Is told, in a line for people, when the server's worker or engine is lost and when it serves again. */
  onNotice?: (text: string) => void;
}

export type Json = null | boolean | number | string | readonly Json[] | { readonly [key: string]: Json };

/** As OpenAI's API has it; what the model sees of a message is its template's business. */
export interface ChatMessage {
  role: string;
  content: string;
  name?: string;
  toolCalls?: readonly Json[];
  toolCallId?: string;
  reasoningContent?: string;
}

/** See PROTOCOL.md's `structured`. */
export interface Structured {
  kind: "json_schema" | "regex" | "choice" | "grammar";
  /** Of a schema (its JSON), an expression or a grammar. */
  text?: string;
  /** Of a choice. */
  options?: readonly string[];
  /** The structure begins behind this text. */
  after?: string;
  /** Only if the output begins with this one; where `features` has "structured_opening". */
  opening?: string;
}

/** Give `prompt` or `messages`. Ranges and meanings are those of PROTOCOL.md's `sampling`. */
export interface GenerateOptions {
  /** Text, or token ids; a Uint32Array is sent packed. */
  prompt?: string | readonly number[] | Uint32Array;
  messages?: readonly ChatMessage[];
  /** With `messages`: what the model's chat template is given besides. */
  tools?: readonly Json[];
  documents?: readonly Json[];
  chatTemplateKwargs?: Readonly<Record<string, string | number | boolean | null>>;
  /** Most tokens of output, 128 by default; null goes to the end of the context. */
  maxTokens?: number | null;
  minTokens?: number;
  temperature?: number;
  topK?: number;
  topP?: number;
  minP?: number;
  repetitionPenalty?: number;
  presencePenalty?: number;
  frequencyPenalty?: number;
  /** `[token id, bias]` each, the bias -100 to 100; where `features` has "logit_bias". */
  logitBias?: readonly (readonly [number, number])[] | null;
  /** 0 to 2^53-1. */
  seed?: number | bigint | null;
  stop?: string | readonly string[];
  stopTokenIds?: readonly number[];
  ignoreEos?: boolean;
  skipSpecialTokens?: boolean;
  /** Samples of the one prompt. */
  n?: number;
  priority?: number;
  deadlineMs?: number | null;
  itlTargetMs?: number | null;
  ttftTargetMs?: number | null;
  tpotTargetMs?: number | null;
  cacheSalt?: string;
  /** What the output must follow; where `features` has "structured". */
  structured?: Structured | null;
  /** Log-probabilities of the output: of each token, and of so many likeliest in its place, 0 to 20. */
  logprobs?: number | null;
  /** The same of the prompt's tokens but the first. */
  promptLogprobs?: number | null;
  /** true: temperature, topK, topP, minP and repetitionPenalty, where not given, are `Welcome.samplingDefaults`. */
  modelDefaults?: boolean;
  /** On whose behalf; where the server trusts this connection (`features` has "tenants"). */
  tenant?: string;
  /** false: each sample comes in one piece. */
  stream?: boolean;
  /** true: `Stream.promptIds` is set. */
  echoIds?: boolean;
  /** Ends the request; the iterator throws the signal's reason. */
  signal?: AbortSignal;
}

/** How a sample ended: "stop", "length", "aborted" or "error". */
export type Finish = string;

export interface TokenLogprob {
  id: number;
  /** Natural logarithm of its probability by the model's own logits. */
  logprob: number;
  /** The token's bytes, which may be part of a character. */
  token: Uint8Array;
}

export interface Logprob extends TokenLogprob {
  /** 1 for the likeliest in its place. */
  rank: number;
  /** The likeliest in its place, as many as were asked for. */
  top: TokenLogprob[];
}

export interface Piece {
  text: string;
  ids: number[];
  sample: number;
  /** Of `ids`, with the option `logprobs`. */
  logprobs: Logprob[] | null;
  /** In the first piece of sample 0, with the option `promptLogprobs`. */
  promptLogprobs: Logprob[] | null;
  /** In the sample's last piece. */
  finish: Finish | null;
}

export interface Output {
  text: string;
  ids: number[];
  finish: Finish | null;
  logprobs: Logprob[] | null;
  promptLogprobs: Logprob[] | null;
}

export interface Usage {
  promptTokens: number;
  outputTokens: number;
  cachedTokens: number;
}

/** Milliseconds since the request reached the server. */
export interface Timing {
  queuedMs: number;
  firstTokenMs: number;
  totalMs: number;
}

export interface Stream extends AsyncIterableIterator<Piece> {
  readonly promptTokens: number | null;
  readonly promptIds: number[] | null;
  readonly finish: Finish[] | null;
  readonly usage: Usage | null;
  readonly timing: Timing | null;
  cancel(): void;
  outputs(): Promise<Output[]>;
}

export interface Limits {
  frameBytes: number;
  promptTokens: number;
  textBytes: number;
  openRequests: number;
  openPromptTokens: number;
  messages: number;
  samples: number;
  stopStrings: number;
  stopStringLen: number;
  stopTokenIds: number;
  deadlineMs: number;
}

/** What the model draws with by itself. */
export interface SamplingDefaults {
  temperature: number;
  topK: number;
  topP: number;
  minP: number;
  repetitionPenalty: number;
}

export interface Welcome {
  version: number;
  session: string;
  instance: string;
  server: string;
  model: string;
  vocabSize: number;
  eosTokenIds: number[];
  features: string[];
  limits: Limits;
  heartbeatMs: number;
  slowConsumerMs: number;
  control: string;
  samplingDefaults: SamplingDefaults;
  /** true: the server was about to end when it answered `hello`, and takes no requests. */
  draining: boolean;
  /** Data addresses of all frontends of the server, where there are several; any of them serves. */
  frontends: string[];
}

export interface Stats {
  sessions: number;
  openRequests: number;
  heldRequests: number;
  running: number;
  waiting: number;
  pagesFree: number;
  pagesTotal: number;
  steps: number;
  finished: number;
  preemptions: number;
  stepMsP50: number;
  stepMsP95: number;
  stepMsP99: number;
  stepMsMax: number;
  deltasSent: number;
  deltasMerged: number;
  messagesRefused: number;
  frontendCpuS: number;
  frontendRssBytes: number;
  workerRestarts: number;
  /** Why the last worker was lost; empty: none was. */
  workerLoss: string;
  poisoned: number;
  numericalErrors: number;
  /** Each for itself, where there are several; the counts above are sums. */
  engines: EngineCount[];
}

/** One of several engines. */
export interface EngineCount {
  /** false: it is being started, or has drained; its counts are 0. */
  serves: boolean;
  running: number;
  waiting: number;
  pagesFree: number;
  pagesTotal: number;
  steps: number;
  finished: number;
  preemptions: number;
  workerRestarts: number;
}

export interface Health {
  status: string;
  ready: boolean;
  workerMs: number;
}

export class Client {
  constructor(address?: string, options?: ClientOptions);
  /** Throws TypeError or RangeError for options that cannot be sent; all else is thrown by the iterator. */
  generate(options: GenerateOptions): Stream;
  welcome(): Promise<Welcome>;
  stats(): Promise<Stats>;
  health(): Promise<Health>;
  close(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

export class GraphgenError extends Error {
  readonly code: string;
  /** The same call may succeed later. */
  readonly retryable: boolean;
  readonly retryAfterMs: number | null;
}
/** The server refused or ended the request; `code` is one of PROTOCOL.md's. */
export class RequestError extends GraphgenError {}
/** `code` is "refused" (nothing listens at the address), "timeout", "lost", "no_session" or "closed". */
export class ConnectionError extends GraphgenError {}
/** The server sent what no server may send. */
export class ProtocolError extends GraphgenError {}

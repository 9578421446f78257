/// What a program gives to the client and gets from it. Owns plain types with the protocol's defaults; no behaviour.
/// ipc/PROTOCOL.md has the meaning and the range of every field.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace graphgen {

/// What an output must follow: `{"json_schema", schema.dump()}`, `{"regex", "[a-z]+"}`, `{"choice", "", {"yes", "no"}}`.
struct Structured {
  std::string kind;  ///< json_schema, regex, choice or grammar.
  std::string text = {};
  std::vector<std::string> options = {};
  std::string after = {};    ///< The structure begins behind this text.
  std::string opening = {};  ///< Only if the output begins with this one; where features has "structured_opening".

  bool operator==(const Structured& other) const {
    return kind == other.kind && text == other.text && options == other.options && after == other.after &&
           opening == other.opening;
  }
};

/// How a request draws its tokens, when it ends and how it is served.
struct Sampling {
  std::optional<std::uint32_t> max_tokens = 128;  ///< Nothing: to the end of the model's context.
  std::uint32_t min_tokens = 0;
  std::optional<double> temperature;  ///< Nothing, here and in the next four: 1 or off, or the model's.
  std::optional<std::uint32_t> top_k;
  std::optional<double> top_p;
  std::optional<double> min_p;
  std::optional<double> repetition_penalty;
  double presence_penalty = 0.0;
  double frequency_penalty = 0.0;
  std::map<std::uint32_t, double> logit_bias;  ///< By token id; where Welcome::features has "logit_bias".
  std::optional<std::uint64_t> seed;  ///< Up to 2^53-1.
  std::vector<std::string> stop;
  std::vector<std::uint32_t> stop_token_ids;
  bool ignore_eos = false;
  bool skip_special_tokens = true;
  std::uint32_t n = 1;  ///< Samples of the one prompt.
  std::uint32_t priority = 0;
  std::optional<double> deadline_ms;
  std::optional<double> itl_target_ms;
  std::optional<double> ttft_target_ms;
  std::optional<double> tpot_target_ms;
  std::string cache_salt;
  std::optional<Structured> structured;  ///< Where Welcome::features has "structured".
  std::optional<std::uint32_t> logprobs;  ///< Of each token of the output, and of so many likeliest, up to 20.
  std::optional<std::uint32_t> prompt_logprobs;  ///< The same of the prompt's tokens but the first.
  bool model_defaults = false;  ///< true: those five, where nothing is given, are Welcome::sampling_defaults.
};

/// What JSON can say, of a tool or a document: `Json::object({{"type", "function"}, {"strict", true}})`.
struct Json {
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json>;

  Json() = default;  ///< null
  Json(std::nullptr_t) {}
  Json(bool value) : value(value) {}
  Json(int value) : value(std::int64_t{value}) {}
  Json(std::int64_t value) : value(value) {}
  Json(double value) : value(value) {}
  Json(const char* value) : value(std::string(value)) {}
  Json(std::string value) : value(std::move(value)) {}
  static Json array(Array items) { return Json(std::move(items), 0); }
  static Json object(Object items) { return Json(std::move(items), 0); }

  bool operator==(const Json& other) const { return value == other.value; }

  std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, Array, Object> value = nullptr;

 private:
  template <typename Items>
  Json(Items items, int) : value(std::move(items)) {}
};

/// What the model sees of a message is its template's business.
struct ChatMessage {
  std::string role;
  std::string content;
  std::optional<std::string> name = {};
  std::vector<Json> tool_calls = {};
  std::optional<std::string> tool_call_id = {};
  std::optional<std::string> reasoning_content = {};
};

using TokenIds = std::vector<std::uint32_t>;
using Chat = std::vector<ChatMessage>;

/// One prompt, in one of three forms, and what to do with it.
struct Request {
  std::variant<std::string, TokenIds, Chat> prompt;
  std::vector<Json> tools = {};  ///< This and the next two: of a Chat, for the model's template.
  std::vector<Json> documents = {};
  Json::Object chat_template_kwargs = {};
  std::string tenant = {};  ///< On whose behalf; where the server trusts this connection (a feature: tenants).
  Sampling sampling = {};
  bool stream = true;     ///< false: each sample comes in one piece.
  bool echo_ids = false;  ///< true: Stream::prompt_ids() has the prompt.
};

struct TokenLogprob {
  std::uint32_t id = 0;
  float logprob = 0;  ///< Natural logarithm of its probability by the model's own logits.
  std::string token;  ///< Its bytes, which may be part of a character.
};

struct Logprob : TokenLogprob {
  std::uint32_t rank = 0;         ///< 1 for the likeliest in its place.
  std::vector<TokenLogprob> top;  ///< The likeliest in its place, as many as were asked for.
};

/// New tokens of one sample.
struct Piece {
  std::string text;
  TokenIds ids;
  std::uint32_t sample = 0;
  std::optional<std::string> finish;  ///< In the sample's last piece: stop, length, aborted or error.
  std::vector<Logprob> logprobs;         ///< Of ids, with Sampling::logprobs.
  std::vector<Logprob> prompt_logprobs;  ///< In the first piece of sample 0, with Sampling::prompt_logprobs.
};

/// A whole sample.
struct Output {
  std::string text;
  TokenIds ids;
  std::string finish;
  std::vector<Logprob> logprobs;
  std::vector<Logprob> prompt_logprobs;
};

struct Usage {
  std::uint64_t prompt_tokens = 0;
  std::uint64_t output_tokens = 0;  ///< Of all samples.
  std::uint64_t cached_tokens = 0;
};

/// Milliseconds since the request reached the server.
struct Timing {
  double queued_ms = 0;
  double first_token_ms = 0;
  double total_ms = 0;
};

struct Limits {
  std::uint64_t frame_bytes = 0;
  std::uint64_t prompt_tokens = 0;
  std::uint64_t text_bytes = 0;
  std::uint64_t open_requests = 0;
  std::uint64_t open_prompt_tokens = 0;
  std::uint64_t messages = 1024;
  std::uint64_t samples = 16;
  std::uint64_t stop_strings = 16;
  std::uint64_t stop_string_len = 1024;
  std::uint64_t stop_token_ids = 16;
  std::uint64_t deadline_ms = 3'600'000;
};

/// What the model draws with by itself.
struct SamplingDefaults {
  double temperature = 1.0;
  std::uint64_t top_k = 0;
  double top_p = 1.0;
  double min_p = 0.0;
  double repetition_penalty = 1.0;
};

/// What the server says of itself.
struct Welcome {
  std::uint64_t version = 0;
  std::string session;
  std::string instance;
  std::string server;
  std::string model;
  std::uint64_t vocab_size = 0;
  std::vector<std::uint64_t> eos_token_ids;
  std::vector<std::string> features;
  Limits limits;
  std::uint64_t heartbeat_ms = 0;
  std::uint64_t slow_consumer_ms = 0;
  std::string control;
  SamplingDefaults sampling_defaults;
  bool draining = false;  ///< The server was about to end when it answered `hello`, and takes no requests.
  std::vector<std::string> frontends;  ///< Data addresses of all frontends of the server, where there are several.
};

/// One of several engines, by the names of PROTOCOL.md's `stats.engines`.
struct EngineCount {
  bool serves = false;  ///< false: it is being started, or has drained; its counts are 0.
  std::map<std::string, std::uint64_t> counts;
};

/// A snapshot, by the names of PROTOCOL.md's `stats`.
struct Stats {
  std::map<std::string, std::uint64_t> counts;
  std::map<std::string, double> times;
  std::string worker_loss;  ///< Why the last worker was lost; empty: none was.
  std::vector<EngineCount> engines;  ///< Each for itself, where there are several; the counts are sums.
};

struct Health {
  std::string status;
  bool ready = false;
  double worker_ms = 0;
};

}  // namespace graphgen

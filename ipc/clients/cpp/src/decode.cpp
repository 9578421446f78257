/// What a server sends: each kind and its fields. See wire.hpp.
#include <cstring>

#include "reading.hpp"
#include "wire.hpp"

namespace graphgen::wire {

void read(const msgpack::object& value, Usage& into) {
  const Map map(value);
  map.required("prompt_tokens", into.prompt_tokens);
  map.required("output_tokens", into.output_tokens);
  map.optional("cached_tokens", into.cached_tokens);
}

void read(const msgpack::object& value, Timing& into) {
  const Map map(value);
  map.required("queued_ms", into.queued_ms);
  map.required("first_token_ms", into.first_token_ms);
  map.required("total_ms", into.total_ms);
}

void read(const msgpack::object& value, Limits& into) {
  const Map map(value);
  map.required("frame_bytes", into.frame_bytes);
  map.required("prompt_tokens", into.prompt_tokens);
  map.required("text_bytes", into.text_bytes);
  map.required("open_requests", into.open_requests);
  map.required("open_prompt_tokens", into.open_prompt_tokens);
  map.optional("messages", into.messages);
  map.optional("samples", into.samples);
  map.optional("stop_strings", into.stop_strings);
  map.optional("stop_string_len", into.stop_string_len);
  map.optional("stop_token_ids", into.stop_token_ids);
  map.optional("deadline_ms", into.deadline_ms);
}

void read(const msgpack::object& value, SamplingDefaults& into) {
  const Map map(value);
  map.optional("temperature", into.temperature);
  map.optional("top_k", into.top_k);
  map.optional("top_p", into.top_p);
  map.optional("min_p", into.min_p);
  map.optional("repetition_penalty", into.repetition_penalty);
}

void read(const msgpack::object& value, Logprobs& into) {
  const Map map(value);
  map.optional("top", into.top);
  if (into.top > 20) throw BadField("top: expected int, 0 to 20");
  map.optional("values", into.values);
  map.optional("tokens", into.tokens);
  map.optional("ids", into.ids);
  map.optional("before", into.before);
}

void read(const Map& map, Delta& into) {
  map.required("id", into.id);
  map.optional("seq", into.seq);
  map.optional("sample", into.sample);
  map.optional("ids", into.ids);
  map.optional("text", into.text);
  map.optional("finish", into.finish);
  map.optional("cached_tokens", into.cached_tokens);
  map.optional("logprobs", into.logprobs);
  map.optional("prompt_logprobs", into.prompt_logprobs);
}

void read(const msgpack::object& value, Delta& into) { read(Map(value), into); }

void read(const msgpack::object& value, EngineCount& into) {
  const Map map(value);
  map.required("serves", into.serves);
  for (const char* name : {"running", "waiting", "pages_free", "pages_total", "steps", "finished", "preemptions",
                           "worker_restarts"}) {
    map.required(name, into.counts[name]);
  }
}

namespace {

constexpr char major = 1;
/// Nothing in the protocol is longer or deeper, and a length that lies must not allocate.
constexpr std::size_t max_items = std::size_t{1} << 20;
constexpr std::size_t max_bytes = std::size_t{16} << 20;
constexpr std::size_t max_depth = 32;

Welcome read_welcome(const Map& map) {
  Welcome message;
  map.required("version", message.version);
  map.required("session", message.session);
  map.required("instance", message.instance);
  map.required("server", message.server);
  map.required("model", message.model);
  map.required("vocab_size", message.vocab_size);
  map.required("eos_token_ids", message.eos_token_ids);
  map.required("features", message.features);
  map.required("limits", message.limits);
  map.required("heartbeat_ms", message.heartbeat_ms);
  map.required("slow_consumer_ms", message.slow_consumer_ms);
  map.required("control", message.control);
  map.optional("sampling_defaults", message.sampling_defaults);
  map.optional("draining", message.draining);
  map.optional("frontends", message.frontends);
  return message;
}

Accepted read_accepted(const Map& map) {
  Accepted message;
  map.required("id", message.id);
  map.required("prompt_tokens", message.prompt_tokens);
  map.optional("prompt_ids", message.prompt_ids);
  map.optional("prompt_text", message.prompt_text);
  return message;
}

Delta read_delta(const Map& map) {
  Delta message;
  read(map, message);
  return message;
}

Deltas read_deltas(const Map& map) {
  Deltas message;
  map.required("items", message.items);
  return message;
}

Done read_done(const Map& map) {
  Done message;
  map.required("id", message.id);
  map.required("finish", message.finish);
  map.required("usage", message.usage);
  map.required("timing", message.timing);
  return message;
}

ErrorMessage read_error(const Map& map) {
  ErrorMessage message;
  map.required("code", message.code);
  map.required("message", message.message);
  map.optional("retryable", message.retryable);
  map.optional("retry_after_ms", message.retry_after_ms);
  map.optional("id", message.id);
  map.optional("about", message.about);
  map.optional("versions", message.versions);
  return message;
}

Draining read_draining(const Map& map) {
  Draining message;
  map.required("grace_ms", message.grace_ms);
  return message;
}

Notice read_notice(const Map& map) {
  Notice message;
  map.required("text", message.text);
  return message;
}

Stats read_stats(const Map& map) {
  Stats message;
  for (const char* name : {"sessions", "open_requests", "held_requests", "running", "waiting", "pages_free",
                           "pages_total", "steps", "finished", "preemptions", "deltas_sent", "deltas_merged",
                           "messages_refused", "frontend_rss_bytes"}) {
    map.required(name, message.counts[name]);
  }
  for (const char* name : {"step_ms_p50", "step_ms_p95", "step_ms_p99", "step_ms_max", "frontend_cpu_s"}) {
    map.required(name, message.times[name]);
  }
  for (const char* name : {"worker_restarts", "poisoned", "numerical_errors"}) {
    map.optional(name, message.counts[name]);
  }
  map.optional("worker_loss", message.worker_loss);
  map.optional("engines", message.engines);
  return message;
}

Health read_health(const Map& map) {
  Health message;
  map.required("status", message.status);
  map.required("ready", message.ready);
  map.required("worker_ms", message.worker_ms);
  return message;
}

template <typename Beat>
Beat read_beat(const Map& map) {
  Beat message;
  map.optional("t", message.t);
  map.optional("instance", message.instance);
  return message;
}

/// The type that a kind is read as. Nothing: no kind that this client knows.
using Reader = ServerMessage (*)(const Map&);

template <typename Message, Message (*read_it)(const Map&)>
ServerMessage as_message(const Map& map) {
  return read_it(map);
}

Reader reader_of(char kind) {
  switch (kind) {
    case 'W': return as_message<Welcome, read_welcome>;
    case 'A': return as_message<Accepted, read_accepted>;
    case 'D': return as_message<Delta, read_delta>;
    case 'U': return as_message<Deltas, read_deltas>;
    case 'F': return as_message<Done, read_done>;
    case 'E': return as_message<ErrorMessage, read_error>;
    case 'N': return as_message<Draining, read_draining>;
    case 'I': return as_message<Notice, read_notice>;
    case 'T': return as_message<Stats, read_stats>;
    case 'M': return as_message<Health, read_health>;
    case 'P': return as_message<Ping, read_beat<Ping>>;
    case 'Q': return as_message<Pong, read_beat<Pong>>;
    default: return nullptr;
  }
}

}  // namespace

std::vector<Logprob> logprobs_of(const Logprobs& found, const TokenIds& ids) {
  const std::size_t top = found.top, size = 8 + 8 * top;
  if (found.values.data.size() != size * ids.size() || found.tokens.size() != (1 + top) * ids.size()) {
    throw ProtocolError("log-probabilities of other tokens than the " + std::to_string(ids.size()) + " they came with");
  }
  const auto word = [&](std::size_t offset) {
    std::uint32_t bits = 0;
    for (int place = 3; place >= 0; --place) {
      bits = bits << 8 | static_cast<unsigned char>(found.values.data[offset + static_cast<std::size_t>(place)]);
    }
    return bits;
  };
  const auto number = [&](std::size_t offset) {
    const std::uint32_t bits = word(offset);
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  std::vector<Logprob> all(ids.size());
  for (std::size_t place = 0; place < ids.size(); ++place) {
    const std::size_t start = size * place, first = (1 + top) * place;
    Logprob& one = all[place];
    one.id = ids[place];
    one.logprob = number(start);
    one.token = found.tokens[first].data;
    one.rank = word(start + 4);
    for (std::size_t likely = 0; likely < top; ++likely) {
      one.top.push_back({word(start + 8 + 4 * likely), number(start + 8 + 4 * (top + likely)),
                         found.tokens[first + 1 + likely].data});
    }
  }
  return all;
}

std::optional<ServerMessage> decode(const std::vector<std::string_view>& frames) {
  if (frames.size() != 2) throw ProtocolError("a message has " + std::to_string(frames.size()) + " frames, not 2");
  const std::string_view header = frames[0], body = frames[1];
  if (header.size() != 4 || header.substr(0, 2) != "GG") throw ProtocolError("the first frame is no header");
  if (header[2] != major) {
    throw ProtocolError("version " + std::to_string(static_cast<unsigned char>(header[2])) + " of the protocol, not 1");
  }
  const Reader reader = reader_of(header[3]);
  if (reader == nullptr) return std::nullopt;
  const std::string kind(1, header[3]);
  try {
    std::size_t end = 0;
    const msgpack::unpack_limit limit(max_items, max_items, max_bytes, max_bytes, max_bytes, max_depth);
    const msgpack::object_handle handle = msgpack::unpack(body.data(), body.size(), end, nullptr, nullptr, limit);
    if (end != body.size()) throw BadField("bytes behind the map");
    return reader(Map(handle.get()));
  } catch (const BadField& error) {
    throw ProtocolError("kind " + kind + ": " + error.what());
  } catch (const msgpack::unpack_error& error) {
    throw ProtocolError("kind " + kind + ": the second frame is no map: " + error.what());
  }
}

}  // namespace graphgen::wire

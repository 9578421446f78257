/// What a client sends: each kind and its fields, those that have their default left out. See wire.hpp.
#include <msgpack.hpp>
#include <stdexcept>

#include "utf8.hpp"
#include "wire.hpp"

namespace graphgen::wire {
namespace {

constexpr std::uint64_t max_seed = (std::uint64_t{1} << 53) - 1;
constexpr std::uint32_t max_token_id = (std::uint32_t{1} << 31) - 1;

/// What msgpack's packer writes into.
struct Sink {
  std::string bytes;
  void write(const char* data, std::size_t size) { bytes.append(data, size); }
};

/// Fields are written behind each other and counted; their map gets its length at the end.
class MapWriter {
 public:
  template <typename Value>
  MapWriter& field(const char* name, const Value& value) {
    ++num_fields_;
    pack(std::string(name));
    pack(value);
    return *this;
  }

  template <typename Value>
  MapWriter& unless_default(const char* name, const Value& value, const Value& fallback) {
    return value == fallback ? *this : field(name, value);
  }

  std::string bytes() const {
    Sink length;
    msgpack::packer<Sink>(length).pack_map(num_fields_);
    return length.bytes + fields_.bytes;
  }

 private:
  void pack(const std::string& text) {
    if (!is_utf8(text)) throw std::invalid_argument("text is not UTF-8: convert it before it is sent");
    packer().pack(text);
  }
  void pack(const MapWriter& map) {
    fields_.bytes += map.bytes();
  }
  template <typename Item>
  void pack(const std::vector<Item>& items) {
    packer().pack_array(static_cast<std::uint32_t>(items.size()));
    for (const Item& item : items) pack(item);
  }
  template <typename Value>
  void pack(const std::optional<Value>& value) {
    if (value) {
      pack(*value);
    } else {
      packer().pack_nil();
    }
  }
  void pack(const ChatMessage& message) {
    MapWriter map;
    map.field("role", message.role).field("content", message.content);
    map.unless_default("name", message.name, {}).unless_default("tool_calls", message.tool_calls, {});
    map.unless_default("tool_call_id", message.tool_call_id, {});
    map.unless_default("reasoning_content", message.reasoning_content, {});
    pack(map);
  }
  void pack(const Json::Object& items) {
    packer().pack_map(static_cast<std::uint32_t>(items.size()));
    for (const auto& [key, value] : items) {
      pack(key);
      pack(value);
    }
  }
  void pack(const std::map<std::uint32_t, double>& pairs) {
    packer().pack_array(static_cast<std::uint32_t>(pairs.size()));
    for (const auto& [token_id, bias] : pairs) packer().pack_array(2).pack(token_id).pack(bias);
  }
  void pack(std::nullptr_t) { packer().pack_nil(); }
  void pack(const Json& json) {
    std::visit([this](const auto& value) { pack(value); }, json.value);
  }
  /// Bytes, not text.
  void pack(const std::vector<char>& data) {
    packer().pack_bin(static_cast<std::uint32_t>(data.size()));
    packer().pack_bin_body(data.data(), static_cast<std::uint32_t>(data.size()));
  }
  template <typename Number>
  std::enable_if_t<std::is_arithmetic_v<Number>> pack(Number number) {
    packer().pack(number);
  }

  msgpack::packer<Sink> packer() { return msgpack::packer<Sink>(fields_); }

  Sink fields_;
  std::uint32_t num_fields_ = 0;
};

Frames frames(char kind, const MapWriter& map) { return {std::string("GG\x01") + kind, map.bytes()}; }

std::vector<char> little_endian(const TokenIds& ids) {
  std::vector<char> bytes;
  bytes.reserve(4 * ids.size());
  for (const std::uint32_t id : ids) {
    if (id > max_token_id) throw std::invalid_argument("token id " + std::to_string(id) + " is above 2^31-1");
    for (int shift = 0; shift < 32; shift += 8) bytes.push_back(static_cast<char>(id >> shift));
  }
  return bytes;
}

MapWriter structured_map(const Structured& structured) {
  MapWriter map;
  map.field("kind", structured.kind).unless_default("text", structured.text, std::string());
  map.unless_default("options", structured.options, {}).unless_default("after", structured.after, std::string());
  map.unless_default("opening", structured.opening, std::string());
  return map;
}

MapWriter sampling_map(const Sampling& sampling) {
  if (sampling.seed && *sampling.seed > max_seed) {
    throw std::invalid_argument("seed " + std::to_string(*sampling.seed) + " is above the limit of 2^53-1");
  }
  const Sampling defaults;
  MapWriter map;
#define FIELD(name) map.unless_default(#name, sampling.name, defaults.name)
  FIELD(max_tokens);
  FIELD(min_tokens);
  FIELD(temperature);
  FIELD(top_k);
  FIELD(top_p);
  FIELD(min_p);
  FIELD(repetition_penalty);
  FIELD(presence_penalty);
  FIELD(frequency_penalty);
  FIELD(logit_bias);
  FIELD(seed);
  FIELD(stop);
  FIELD(stop_token_ids);
  FIELD(ignore_eos);
  FIELD(skip_special_tokens);
  FIELD(n);
  FIELD(priority);
  FIELD(deadline_ms);
  FIELD(itl_target_ms);
  FIELD(ttft_target_ms);
  FIELD(tpot_target_ms);
  FIELD(cache_salt);
  FIELD(logprobs);
  FIELD(prompt_logprobs);
  FIELD(model_defaults);
#undef FIELD
  if (sampling.structured) map.field("structured", structured_map(*sampling.structured));
  return map;
}

template <typename Beat>
MapWriter beat_map(const Beat& message) {
  MapWriter map;
  map.unless_default("t", message.t, std::uint64_t{0}).unless_default("instance", message.instance, std::string());
  return map;
}

}  // namespace

Frames encode(const Hello& message) {
  MapWriter map;
  map.field("versions", std::vector<std::uint64_t>(message.versions.begin(), message.versions.end()));
  map.unless_default("client", message.client, std::string());
  map.unless_default("notices", message.notices, false).unless_default("batches", message.batches, false);
  return frames('H', map);
}

Frames encode(std::uint64_t id, const Request& request) {
  MapWriter map;
  map.field("id", id);
  if (const auto* text = std::get_if<std::string>(&request.prompt)) map.field("text", *text);
  if (const auto* ids = std::get_if<TokenIds>(&request.prompt)) map.field("prompt_u32", little_endian(*ids));
  if (const auto* chat = std::get_if<Chat>(&request.prompt)) map.field("messages", *chat);
  map.unless_default("tools", request.tools, {}).unless_default("documents", request.documents, {});
  map.unless_default("chat_template_kwargs", request.chat_template_kwargs, {});
  map.unless_default("tenant", request.tenant, {});
  map.field("sampling", sampling_map(request.sampling));
  map.unless_default("stream", request.stream, true).unless_default("echo_ids", request.echo_ids, false);
  return frames('G', map);
}

Frames encode(const Cancel& message) {
  MapWriter map;
  map.field("id", message.id).unless_default("session", message.session, std::string());
  return frames('X', map);
}

Frames encode(const StatsRequest&) { return frames('S', MapWriter()); }
Frames encode(const HealthRequest&) { return frames('L', MapWriter()); }
Frames encode(const Bye&) { return frames('B', MapWriter()); }
Frames encode(const Ping& message) { return frames('P', beat_map(message)); }
Frames encode(const Pong& message) { return frames('Q', beat_map(message)); }

}  // namespace graphgen::wire

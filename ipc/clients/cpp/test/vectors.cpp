/// The conformance vectors, in the direction of a client: what a server sends is decoded or refused, what a client
/// sends is encoded. `vectors FOLDER [FILE]`; the encoded frames are written to FILE, for another decoder to judge.
#include <fstream>
#include <iostream>
#include <map>
#include <vector>

#include "json.hpp"
#include "wire.hpp"

namespace {

using graphgen::test::from_hex;
using graphgen::test::json;
using graphgen::test::request_of;
using graphgen::test::to_hex;
namespace wire = graphgen::wire;

json read_json(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  return json::parse(file);
}

std::string bytes_of(const json& frame) {
  if (frame.is_string()) return from_hex(frame);
  std::string bytes;
  for (const json& repeat : frame) {
    const std::string piece = from_hex(repeat[0]);
    for (std::size_t times = repeat[1]; times > 0; --times) bytes += piece;
  }
  return bytes;
}

json with_defaults(const json& defaults, const std::string& kind, const json& value) {
  json whole = defaults.value(kind, json::object());
  whole.update(value);
  // What only a server's own processes ask for.
  const std::map<std::string, std::vector<std::string>> own = {
      {"stats", {"metrics", "live"}},    {"accepted", {"tail"}}, {"delta", {"marks", "queued_ms", "deaths"}},
      {"welcome", {"capacity"}},        {"hello", {"routes"}},  {"generate", {"routed"}}};
  if (const auto found = own.find(kind); found != own.end()) {
    for (const std::string& field : found->second) whole.erase(field);
  }
  for (const char* field : {"sampling", "limits", "sampling_defaults", "usage"}) {
    if (!whole.contains(field)) continue;
    json inner = defaults.at(field);
    inner.update(whole.at(field));
    whole[field] = inner;
  }
  for (const char* field : {"logprobs", "prompt_logprobs"}) {
    if (!whole.contains(field) || !whole[field].is_object()) continue;
    json inner = defaults.at("logprobs");
    inner.update(whole.at(field));
    whole[field] = inner;
  }
  if (whole.contains("messages") && whole["messages"].is_array()) {
    for (json& message : whole["messages"]) message = with_defaults(defaults, "chat_message", message);
  }
  if (whole.contains("items")) {
    for (json& item : whole["items"]) item = with_defaults(defaults, "delta", item);
  }
  return whole;
}

template <typename Value>
json or_null(const std::optional<Value>& value) {
  return value ? json(*value) : json(nullptr);
}

json bin_of(const wire::Bytes& bytes) { return {{"bin", to_hex(bytes.data)}}; }

json or_null(const std::optional<wire::Logprobs>& found) {
  if (!found) return nullptr;
  json tokens = json::array();
  for (const wire::Bytes& token : found->tokens) tokens.push_back(bin_of(token));
  return {{"top", found->top}, {"values", bin_of(found->values)}, {"tokens", tokens}, {"ids", found->ids},
          {"before", bin_of(found->before)}};
}

/// A decoded message as the vectors write it.
struct ToJson {
  json operator()(const graphgen::Welcome& m) const {
    const graphgen::Limits& l = m.limits;
    const graphgen::SamplingDefaults& d = m.sampling_defaults;
    return {{"version", m.version}, {"session", m.session}, {"instance", m.instance}, {"server", m.server},
            {"model", m.model}, {"vocab_size", m.vocab_size}, {"eos_token_ids", m.eos_token_ids},
            {"features", m.features}, {"heartbeat_ms", m.heartbeat_ms}, {"slow_consumer_ms", m.slow_consumer_ms},
            {"control", m.control}, {"draining", m.draining}, {"frontends", m.frontends},
            {"sampling_defaults",
             {{"temperature", d.temperature}, {"top_k", d.top_k}, {"top_p", d.top_p}, {"min_p", d.min_p},
              {"repetition_penalty", d.repetition_penalty}}},
            {"limits",
             {{"frame_bytes", l.frame_bytes}, {"prompt_tokens", l.prompt_tokens}, {"text_bytes", l.text_bytes},
              {"open_requests", l.open_requests}, {"open_prompt_tokens", l.open_prompt_tokens},
              {"messages", l.messages}, {"samples", l.samples}, {"stop_strings", l.stop_strings},
              {"stop_string_len", l.stop_string_len}, {"stop_token_ids", l.stop_token_ids},
              {"deadline_ms", l.deadline_ms}}}};
  }
  json operator()(const wire::Accepted& m) const {
    return {{"id", m.id}, {"prompt_tokens", m.prompt_tokens}, {"prompt_ids", or_null(m.prompt_ids)},
            {"prompt_text", or_null(m.prompt_text)}};
  }
  json operator()(const wire::Delta& m) const {
    return {{"id", m.id},   {"seq", m.seq},   {"sample", m.sample},
            {"ids", m.ids}, {"text", m.text}, {"finish", or_null(m.finish)}, {"cached_tokens", m.cached_tokens},
            {"logprobs", or_null(m.logprobs)}, {"prompt_logprobs", or_null(m.prompt_logprobs)}};
  }
  json operator()(const wire::Deltas& m) const {
    json items = json::array();
    for (const wire::Delta& item : m.items) items.push_back((*this)(item));
    return {{"items", items}};
  }
  json operator()(const wire::Done& m) const {
    return {{"id", m.id},
            {"finish", m.finish},
            {"usage",
             {{"prompt_tokens", m.usage.prompt_tokens},
              {"output_tokens", m.usage.output_tokens},
              {"cached_tokens", m.usage.cached_tokens}}},
            {"timing",
             {{"queued_ms", m.timing.queued_ms},
              {"first_token_ms", m.timing.first_token_ms},
              {"total_ms", m.timing.total_ms}}}};
  }
  json operator()(const wire::ErrorMessage& m) const {
    return {{"code", m.code},   {"message", m.message}, {"retryable", m.retryable}, {"retry_after_ms", or_null(m.retry_after_ms)},
            {"id", or_null(m.id)}, {"about", m.about},  {"versions", or_null(m.versions)}};
  }
  json operator()(const wire::Draining& m) const { return {{"grace_ms", m.grace_ms}}; }
  json operator()(const wire::Notice& m) const { return {{"text", m.text}}; }
  json operator()(const graphgen::Stats& m) const {
    json all = m.counts;
    all.update(json(m.times));
    all["worker_loss"] = m.worker_loss;
    all["engines"] = json::array();
    for (const graphgen::EngineCount& engine : m.engines) {
      json one = engine.counts;
      one["serves"] = engine.serves;
      all["engines"].push_back(one);
    }
    return all;
  }
  json operator()(const graphgen::Health& m) const {
    return {{"status", m.status}, {"ready", m.ready}, {"worker_ms", m.worker_ms}};
  }
  json operator()(const wire::Ping& m) const { return {{"t", m.t}, {"instance", m.instance}}; }
  json operator()(const wire::Pong& m) const { return {{"t", m.t}, {"instance", m.instance}}; }
};

/// What came of a message: its value, "ignore", or "refused".
json outcome_of(const json& frames) {
  std::vector<std::string> bytes;
  for (const json& frame : frames) bytes.push_back(bytes_of(frame));
  try {
    const auto message = wire::decode({bytes.begin(), bytes.end()});
    return message ? std::visit(ToJson(), *message) : json("ignore");
  } catch (const graphgen::ProtocolError&) {
    return "refused";
  }
}

/// Token ids in a list go out packed: the same prompt.
json packed(json value) {
  if (!value.contains("prompt_ids") || value["prompt_ids"].is_null()) return value;
  std::string bytes;
  for (const std::uint32_t id : value["prompt_ids"].get<std::vector<std::uint32_t>>()) {
    for (int shift = 0; shift < 32; shift += 8) bytes.push_back(static_cast<char>(id >> shift));
  }
  value["prompt_ids"] = nullptr;
  value["prompt_u32"] = {{"bin", to_hex(bytes)}};
  return value;
}

/// By a decoder that is not the client's.
json decoded(const std::string& map) {
  json value = json::from_msgpack(map);
  if (value.contains("prompt_u32")) {
    const auto& bytes = value["prompt_u32"].get_binary();
    value["prompt_u32"] = {{"bin", to_hex(std::string(bytes.begin(), bytes.end()))}};
  }
  return value;
}

wire::Frames encoded(const std::string& kind, const json& value) {
  if (kind == "hello") {
    wire::Hello hello;
    if (value.contains("versions")) hello.versions = value["versions"];
    return wire::encode(wire::Hello{hello.versions, value.value("client", ""), value.value("notices", false),
                                    value.value("batches", false)});
  }
  if (kind == "generate") return wire::encode(value.at("id"), request_of(value));
  if (kind == "cancel") return wire::encode(wire::Cancel{value.at("id"), value.value("session", "")});
  if (kind == "stats_request") return wire::encode(wire::StatsRequest{});
  if (kind == "health_request") return wire::encode(wire::HealthRequest{});
  if (kind == "bye") return wire::encode(wire::Bye{});
  const std::uint64_t t = value.value("t", 0ull);
  if (kind == "ping") return wire::encode(wire::Ping{t, ""});
  if (kind == "pong") return wire::encode(wire::Pong{t, ""});
  throw std::runtime_error("no client sends a " + kind);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: vectors FOLDER [FILE]\n";
    return 2;
  }
  const std::string folder = argv[1];
  const json defaults = read_json(folder + "/defaults.json");
  int right = 0, wrong = 0;
  const auto judge = [&](const json& vector, const json& found, const json& expected) {
    found == expected ? ++right : ++wrong;
    if (found != expected) {
      std::cout << vector["name"] << ": found " << found.dump() << ", expected " << expected.dump() << "\n";
    }
  };
  for (const json& vector : read_json(folder + "/server.json")) {
    const std::string expect = vector["expect"];
    const json expected = vector["kind"] == "load" ? json("ignore")  // it comes to frontends alone
                          : expect == "ok"     ? with_defaults(defaults, vector["kind"], vector["value"])
                          : expect == "ignore" ? json("ignore")
                                               : json("refused");
    judge(vector, outcome_of(vector["frames"]), expected);
  }
  json frames = json::object();
  for (const json& vector : read_json(folder + "/client.json")) {
    if (vector["expect"] != "ok") continue;
    const std::string kind = vector["kind"];
    // What only a server's own processes ask and say.
    if (kind == "report" || (kind == "stats_request" && !vector["value"].empty())) continue;
    if (vector["value"].contains("routes") || vector["value"].contains("routed")) continue;
    const wire::Frames sent = encoded(kind, vector["value"]);
    frames[vector["name"].get<std::string>()] = {to_hex(sent[0]), to_hex(sent[1])};
    judge(vector, with_defaults(defaults, kind, decoded(sent[1])),
          with_defaults(defaults, kind, packed(vector["value"])));
  }
  if (argc > 2) std::ofstream(argv[2]) << frames.dump();
  std::cout << right << " vectors as expected, " << wrong << " not\n";
  return wrong == 0 ? 0 : 1;
}

/// Vectors and plans are JSON: requests from it, and what the client has to JSON. Used by the tests alone.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "graphgen/messages.hpp"

namespace graphgen::test {

using nlohmann::json;

inline std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (std::size_t place = 0; place + 1 < hex.size(); place += 2) {
    bytes.push_back(static_cast<char>(std::stoi(hex.substr(place, 2), nullptr, 16)));
  }
  return bytes;
}

inline std::string to_hex(const std::string& bytes) {
  const char* digits = "0123456789abcdef";
  std::string hex;
  for (const unsigned char byte : bytes) {
    hex.push_back(digits[byte >> 4]);
    hex.push_back(digits[byte & 15]);
  }
  return hex;
}

template <typename Value>
void take(const json& fields, const char* name, Value& into) {
  if (fields.contains(name)) fields.at(name).get_to(into);
}

template <typename Value>
void take(const json& fields, const char* name, std::optional<Value>& into) {
  if (!fields.contains(name)) return;
  if (fields.at(name).is_null()) {
    into.reset();
  } else {
    into = fields.at(name).get<Value>();
  }
}

inline Json value_of(const json& value) {
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_number_integer()) return value.get<std::int64_t>();
  if (value.is_number()) return value.get<double>();
  if (value.is_string()) return value.get<std::string>();
  if (value.is_array()) {
    Json::Array items;
    for (const json& item : value) items.push_back(value_of(item));
    return Json::array(items);
  }
  if (value.is_object()) {
    Json::Object items;
    for (const auto& [key, item] : value.items()) items[key] = value_of(item);
    return Json::object(items);
  }
  return nullptr;
}

inline std::vector<Json> values_of(const json& fields, const char* name) {
  std::vector<Json> values;
  for (const json& value : fields.value(name, json::array())) values.push_back(value_of(value));
  return values;
}

inline ChatMessage message_of(const json& fields) {
  ChatMessage message{fields.at("role"), fields.at("content")};
  take(fields, "name", message.name);
  take(fields, "tool_call_id", message.tool_call_id);
  take(fields, "reasoning_content", message.reasoning_content);
  message.tool_calls = values_of(fields, "tool_calls");
  return message;
}

inline Structured structured_of(const json& fields) {
  Structured structured{fields.at("kind")};
  take(fields, "text", structured.text);
  take(fields, "options", structured.options);
  take(fields, "after", structured.after);
  take(fields, "opening", structured.opening);
  return structured;
}

inline Sampling sampling_of(const json& fields) {
  Sampling sampling;
  take(fields, "max_tokens", sampling.max_tokens);
  take(fields, "min_tokens", sampling.min_tokens);
  take(fields, "temperature", sampling.temperature);
  take(fields, "top_k", sampling.top_k);
  take(fields, "top_p", sampling.top_p);
  take(fields, "min_p", sampling.min_p);
  take(fields, "repetition_penalty", sampling.repetition_penalty);
  take(fields, "presence_penalty", sampling.presence_penalty);
  take(fields, "frequency_penalty", sampling.frequency_penalty);
  if (fields.contains("logit_bias") && !fields.at("logit_bias").is_null()) {
    for (const json& pair : fields.at("logit_bias")) {
      sampling.logit_bias[pair.at(0).get<std::uint32_t>()] = pair.at(1).get<double>();
    }
  }
  take(fields, "seed", sampling.seed);
  take(fields, "stop", sampling.stop);
  take(fields, "stop_token_ids", sampling.stop_token_ids);
  take(fields, "ignore_eos", sampling.ignore_eos);
  take(fields, "skip_special_tokens", sampling.skip_special_tokens);
  take(fields, "n", sampling.n);
  take(fields, "priority", sampling.priority);
  take(fields, "deadline_ms", sampling.deadline_ms);
  take(fields, "itl_target_ms", sampling.itl_target_ms);
  take(fields, "ttft_target_ms", sampling.ttft_target_ms);
  take(fields, "tpot_target_ms", sampling.tpot_target_ms);
  take(fields, "cache_salt", sampling.cache_salt);
  if (fields.contains("structured") && !fields.at("structured").is_null()) {
    sampling.structured = structured_of(fields.at("structured"));
  }
  take(fields, "logprobs", sampling.logprobs);
  take(fields, "prompt_logprobs", sampling.prompt_logprobs);
  take(fields, "model_defaults", sampling.model_defaults);
  return sampling;
}

/// The fields of a `generate` as a request of this client.
inline Request request_of(const json& fields) {
  Request request;
  if (fields.contains("text")) {
    request.prompt = fields.at("text").get<std::string>();
  } else if (fields.contains("prompt_ids")) {
    request.prompt = fields.at("prompt_ids").get<TokenIds>();
  } else if (fields.contains("prompt_u32")) {
    const std::string bytes = from_hex(fields.at("prompt_u32").at("bin"));
    TokenIds ids(bytes.size() / 4);
    for (std::size_t place = 0; place < bytes.size(); ++place) {
      ids[place / 4] |= static_cast<std::uint32_t>(static_cast<unsigned char>(bytes[place])) << (8 * (place % 4));
    }
    request.prompt = ids;
  } else {
    Chat chat;
    for (const json& message : fields.at("messages")) chat.push_back(message_of(message));
    request.prompt = chat;
  }
  take(fields, "tenant", request.tenant);
  request.tools = values_of(fields, "tools");
  request.documents = values_of(fields, "documents");
  const json switches = fields.value("chat_template_kwargs", json::object());
  for (const auto& [name, value] : switches.items()) {
    request.chat_template_kwargs[name] = value_of(value);
  }
  request.sampling = sampling_of(fields.value("sampling", json::object()));
  take(fields, "stream", request.stream);
  take(fields, "echo_ids", request.echo_ids);
  return request;
}

}  // namespace graphgen::test

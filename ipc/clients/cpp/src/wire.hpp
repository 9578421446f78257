/// Messages to frames and back. Owns the kinds and the check of what a server sends; never touches a socket.
/// Called by connection.cpp and by the tests.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "graphgen/errors.hpp"
#include "graphgen/messages.hpp"

namespace graphgen::wire {

struct Hello {
  std::array<std::uint64_t, 2> versions = {1, 1};
  std::string client;
  bool notices = false;
  bool batches = false;
};
struct Cancel {
  std::uint64_t id = 0;
  std::string session;
};
struct StatsRequest {};
struct HealthRequest {};
struct Bye {};

struct Ping {
  std::uint64_t t = 0;
  std::string instance;
};
struct Pong {
  std::uint64_t t = 0;
  std::string instance;
};

struct Accepted {
  std::uint64_t id = 0;
  std::uint64_t prompt_tokens = 0;
  std::optional<TokenIds> prompt_ids;
  std::optional<std::string> prompt_text;
};
struct Bytes {
  std::string data;
};
struct Logprobs {
  std::uint64_t top = 0;
  Bytes values;
  std::vector<Bytes> tokens;
  TokenIds ids;
  Bytes before;
};
struct Delta {
  std::uint64_t id = 0;
  std::uint64_t seq = 0;
  std::uint64_t sample = 0;
  TokenIds ids;
  std::string text;
  std::optional<std::string> finish;
  std::uint64_t cached_tokens = 0;
  std::optional<Logprobs> logprobs;
  std::optional<Logprobs> prompt_logprobs;
};
struct Deltas {
  std::vector<Delta> items;
};
struct Done {
  std::uint64_t id = 0;
  std::vector<std::string> finish;
  Usage usage;
  Timing timing;
};
struct ErrorMessage {
  std::string code;
  std::string message;
  bool retryable = false;
  std::optional<std::uint64_t> retry_after_ms;
  std::optional<std::uint64_t> id;
  std::string about;
  std::optional<std::vector<std::uint64_t>> versions;
};
struct Draining {
  std::uint64_t grace_ms = 0;
};
struct Notice {
  std::string text;
};

using ServerMessage =
    std::variant<Welcome, Accepted, Delta, Deltas, Done, ErrorMessage, Draining, Notice, Stats, Health, Ping, Pong>;

/// Header and map.
using Frames = std::array<std::string, 2>;

Frames encode(const Hello& message);
/// Throws std::invalid_argument for text that is not UTF-8 and for a seed above 2^53-1.
Frames encode(std::uint64_t id, const Request& request);
Frames encode(const Cancel& message);
Frames encode(const StatsRequest& message);
Frames encode(const HealthRequest& message);
Frames encode(const Bye& message);
Frames encode(const Ping& message);
Frames encode(const Pong& message);

/// What is said of each token. Throws ProtocolError where it is not said of so many.
std::vector<Logprob> logprobs_of(const Logprobs& found, const TokenIds& ids);

/// Nothing: a kind that is not known here, to be ignored. Throws ProtocolError.
std::optional<ServerMessage> decode(const std::vector<std::string_view>& frames);

}  // namespace graphgen::wire

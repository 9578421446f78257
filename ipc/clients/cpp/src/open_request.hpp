/// One request between the connection's thread, which fills it, and its reader, who waits. Owns the pieces that have come
/// and were not read, and the check that no token is missing. Knows nothing of sockets.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>

#include "graphgen/errors.hpp"
#include "graphgen/messages.hpp"
#include "wire.hpp"

namespace graphgen {

class Connection;

struct OpenRequest {
  explicit OpenRequest(Request asked) : request(std::move(asked)) {}

  const Request request;

  std::mutex mutex;  ///< Of everything below.
  std::condition_variable changed;
  std::weak_ptr<Connection> connection;
  std::uint64_t id = 0;
  std::deque<Piece> pieces;
  std::map<std::uint64_t, std::uint64_t> num_tokens;  ///< By sample.
  std::exception_ptr error;
  bool begun = false;     ///< The server has accepted it.
  bool ended = false;
  bool left = false;      ///< Nobody reads on: what still comes is dropped.
  bool repeated = false;  ///< Asked a second time, after a server had forgotten the session.
  std::vector<std::string> finish;
  Usage usage;
  Timing timing;
  TokenIds prompt_ids;

  void take(wire::Accepted message) {
    const std::lock_guard lock(mutex);
    begun = true;
    if (message.prompt_ids) prompt_ids = std::move(*message.prompt_ids);
  }

  /// False: tokens are missing, or what is said of them is of others, and the request has failed.
  bool take(wire::Delta message) {
    const std::lock_guard lock(mutex);
    std::uint64_t& count = num_tokens[message.sample];
    if (message.seq != count) {
      end_with(std::make_exception_ptr(ProtocolError("a sample had " + std::to_string(count) +
                                                     " tokens and goes on at " + std::to_string(message.seq))));
      return false;
    }
    count += message.ids.size();
    if (left || ended) return true;
    Piece piece;
    try {
      if (message.logprobs) piece.logprobs = wire::logprobs_of(*message.logprobs, message.ids);
      if (const auto& of_prompt = message.prompt_logprobs) {
        piece.prompt_logprobs = wire::logprobs_of(*of_prompt, of_prompt->ids);
      }
    } catch (const ProtocolError&) {
      end_with(std::current_exception());
      return false;
    }
    piece.text = std::move(message.text);
    piece.ids = std::move(message.ids);
    piece.sample = static_cast<std::uint32_t>(message.sample);
    piece.finish = std::move(message.finish);
    pieces.push_back(std::move(piece));
    changed.notify_all();
    return true;
  }

  void take(wire::Done message) {
    const std::lock_guard lock(mutex);
    finish = std::move(message.finish);
    usage = message.usage;
    timing = message.timing;
    end_with(nullptr);
  }

  void fail(std::exception_ptr reason) {
    const std::lock_guard lock(mutex);
    end_with(std::move(reason));
  }

 private:
  void end_with(std::exception_ptr reason) {
    if (ended) return;
    ended = true;
    error = std::move(reason);
    changed.notify_all();
  }
};

}  // namespace graphgen

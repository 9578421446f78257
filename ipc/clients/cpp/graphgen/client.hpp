/// A client of graphgen servers: text streamed over ZeroMQ. README.md shows its use.
///
///   graphgen::Client client;
///   for (const auto& piece : client.generate({"ROMEO:"})) std::cout << piece.text << std::flush;
///
/// Owns the public classes. A Client may be used by many threads; a Stream by one at a time.
#pragma once

#include <chrono>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "graphgen/errors.hpp"
#include "graphgen/messages.hpp"

namespace graphgen {

class Connection;
class ConnectionSource;
struct OpenRequest;

/// Of a CURVE connection; each key is 40 characters, as `graphgen keys` prints it.
struct CurveKeys {
  std::string server_key;
  std::string public_key;
  std::string secret_key;
};

struct ClientOptions {
  std::optional<CurveKeys> curve;
  /// For the server's welcome.
  std::chrono::milliseconds connect_timeout{10'000};
  /// Open requests are given up when the server was silent for so long.
  std::chrono::milliseconds lost_after{10'000};
  /// The server is about to end; open requests go on for so long. Called by the client's own thread: do not block it.
  std::function<void(std::chrono::milliseconds)> on_draining;
  /// Is told, in a line for people, when the server's worker or engine is lost and when it serves again. Called by the
  /// client's own thread: do not block it.
  std::function<void(const std::string&)> on_notice;
};

/// The output of one request. Its destructor cancels what has not ended.
class Stream {
 public:
  /// An input iterator, so that a range-based for reads the stream.
  class Iterator {
   public:
    using iterator_category = std::input_iterator_tag;
    using value_type = Piece;
    using difference_type = std::ptrdiff_t;
    using pointer = const Piece*;
    using reference = const Piece&;

    explicit Iterator(Stream* stream) : stream_(stream) { ++*this; }
    Iterator() = default;
    reference operator*() const { return *piece_; }
    pointer operator->() const { return &*piece_; }
    Iterator& operator++() {
      piece_ = stream_->next();
      return *this;
    }
    void operator++(int) { ++*this; }
    /// Only the end equals the end.
    bool operator==(const Iterator& other) const { return !piece_ && !other.piece_; }
    bool operator!=(const Iterator& other) const { return !(*this == other); }

   private:
    Stream* stream_ = nullptr;
    std::optional<Piece> piece_;
  };

  Stream(Stream&&) noexcept;
  Stream& operator=(Stream&&) noexcept;
  ~Stream();

  /// The next piece, waiting for it; nothing at the end. Throws what ended the request.
  std::optional<Piece> next();
  Iterator begin() { return Iterator(this); }
  Iterator end() { return {}; }

  /// Reads to the end: one output for each sample.
  std::vector<Output> outputs();

  /// Ends the request; pieces that were on their way still come, the last one with finish `aborted`. From any thread.
  void cancel();

  /// Once the end was read.
  const std::vector<std::string>& finish() const;
  const Usage& usage() const;
  const Timing& timing() const;
  /// With Request::echo_ids, once the first piece was read.
  const TokenIds& prompt_ids() const;

 private:
  friend class Client;
  Stream(std::shared_ptr<ConnectionSource> source, std::shared_ptr<OpenRequest> request);

  std::shared_ptr<ConnectionSource> source_;
  std::shared_ptr<OpenRequest> request_;
};

class Client {
 public:
  /// Does not connect yet: the first call does, and a call after the loss of the server does again.
  explicit Client(std::string address = "tcp://127.0.0.1:5755", ClientOptions options = {});
  ~Client();
  Client(Client&&) noexcept;
  Client& operator=(Client&&) noexcept;

  /// Sends the request. Throws ConnectionError, or std::invalid_argument for what cannot be sent.
  Stream generate(const Request& request);

  Welcome welcome();
  Stats stats();
  /// After a round trip through the server's scheduler and worker.
  Health health();

  /// Ends what is open. The destructor does, too.
  void close();

 private:
  std::shared_ptr<ConnectionSource> source_;
};

}  // namespace graphgen

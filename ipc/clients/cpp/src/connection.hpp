/// One DEALER socket and the session on it, from `hello` to the end of either.
///
/// Owns the socket, the thread that alone uses it, the table of open requests, and the decision that a server is gone. A
/// connection that has ended stays so: client.cpp makes another one. Knows nothing of texts.
#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <exception>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <zmq.hpp>

#include "graphgen/client.hpp"
#include "open_request.hpp"
#include "wire.hpp"

namespace graphgen {

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  /// was_there: a server answered there before, and may be starting again.
  Connection(const std::string& address, ClientOptions options, bool was_there);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  /// Waits for it. Throws what ended the connection instead.
  const Welcome& welcome();
  bool ended() const { return ended_; }

  /// Sends a `generate` over a connection that was welcomed; the request hears of it until its end, whatever happens.
  /// Throws RequestError `too_large` where its frame would end the connection, and with it all that is open.
  void send(const std::shared_ptr<OpenRequest>& request);
  void cancel(std::uint64_t id);
  Stats stats();
  Health health();
  /// Ends the session; the server cancels what is open.
  void close();

 private:
  using Clock = std::chrono::steady_clock;

  void run();
  void connect();
  void watch_refusals();
  void loop();
  void put(wire::Frames frames);
  void send_outbox();
  void receive();
  void take(wire::ServerMessage message);
  void take_delta(wire::Delta delta);
  void take_error(const wire::ErrorMessage& message);
  void check_instance(const std::string& instance);
  std::shared_ptr<OpenRequest> find(std::uint64_t id, bool ends);
  void tick();
  std::chrono::milliseconds until_tick();
  bool busy();
  void end(std::exception_ptr reason);
  template <typename Answer>
  Answer ask(std::deque<std::promise<Answer>>& asked, wire::Frames frames);

  const std::string address_;
  const ClientOptions options_;
  zmq::context_t context_;
  zmq::socket_t socket_;       // the thread's
  zmq::socket_t wake_sender_;  // under mutex_
  zmq::socket_t wake_receiver_;
  zmq::socket_t monitor_;  // the thread's
  const bool was_there_;
  std::optional<Clock::time_point> refused_;  // since when nobody listens
  Clock::time_point began_ = Clock::now();
  Clock::time_point last_heard_ = began_;
  Clock::time_point last_tick_ = began_;

  std::mutex mutex_;  // of everything below
  std::deque<wire::Frames> outbox_;
  std::map<std::uint64_t, std::shared_ptr<OpenRequest>> open_;
  std::deque<std::promise<Stats>> asked_stats_;
  std::deque<std::promise<Health>> asked_health_;
  std::uint64_t next_id_ = 1;
  bool closing_ = false;
  std::exception_ptr end_reason_;

  std::atomic<bool> ended_ = false;
  std::atomic<bool> welcomed_ = false;
  std::promise<Welcome> welcome_promise_;
  std::shared_future<Welcome> welcome_ = welcome_promise_.get_future().share();
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace graphgen

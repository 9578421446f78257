/// See connection.hpp.
#include "connection.hpp"

#include <algorithm>
#include <cstring>
#include <utility>
#include <zmq_addon.hpp>

namespace graphgen {
namespace {

using std::chrono::milliseconds;

constexpr const char* client_name = "graphgen-cpp/0.1";
constexpr const char* wake_address = "inproc://wake";
constexpr const char* monitor_address = "inproc://monitor";
/// How long a server may refuse connections before there is none: one that is about to listen does so by then.
constexpr milliseconds refused_limit(500);
/// Silent for so many heartbeats, a server is asked whether it lives.
constexpr int patience_heartbeats = 3;
/// What was sent last may still go out for so long after close().
constexpr int linger_ms = 200;

template <typename Failure>
std::exception_ptr retryable(const char* code, const std::string& message) {
  return std::make_exception_ptr(Failure(code, message, true));
}

}  // namespace

Connection::Connection(const std::string& address, ClientOptions options, bool was_there)
    : address_(address),
      options_(std::move(options)),
      socket_(context_, zmq::socket_type::dealer),
      wake_sender_(context_, zmq::socket_type::pair),
      wake_receiver_(context_, zmq::socket_type::pair),
      monitor_(context_, zmq::socket_type::pair),
      was_there_(was_there) {
  wake_receiver_.bind(wake_address);
  wake_sender_.connect(wake_address);
  connect();
  thread_ = std::thread(&Connection::run, this);
}

Connection::~Connection() {
  close();
  if (thread_.joinable()) thread_.join();
}

const Welcome& Connection::welcome() { return welcome_.get(); }

void Connection::send(const std::shared_ptr<OpenRequest>& request) {
  std::uint64_t id = 0;
  {
    const std::lock_guard lock(mutex_);
    id = next_id_++;
  }
  wire::Frames frames = wire::encode(id, request->request);  // may throw: nothing is open yet
  const std::uint64_t limit = welcome().limits.frame_bytes;
  if (frames[1].size() > limit) {
    throw RequestError("too_large", "the request takes " + std::to_string(frames[1].size()) +
                                        " bytes, the server's limit is " + std::to_string(limit) + ": shorten it");
  }
  {
    const std::lock_guard lock(request->mutex);
    request->connection = weak_from_this();
    request->id = id;
  }
  {
    const std::lock_guard lock(mutex_);
    if (end_reason_) std::rethrow_exception(end_reason_);
    open_[id] = request;
  }
  put(std::move(frames));
}

void Connection::cancel(std::uint64_t id) { put(wire::encode(wire::Cancel{id, ""})); }

Stats Connection::stats() { return ask(asked_stats_, wire::encode(wire::StatsRequest{})); }

Health Connection::health() { return ask(asked_health_, wire::encode(wire::HealthRequest{})); }

template <typename Answer>
Answer Connection::ask(std::deque<std::promise<Answer>>& asked, wire::Frames frames) {
  std::future<Answer> answer;
  {
    const std::lock_guard lock(mutex_);
    if (end_reason_) std::rethrow_exception(end_reason_);
    answer = asked.emplace_back().get_future();
  }
  put(std::move(frames));
  return answer.get();
}

void Connection::close() {
  put(wire::encode(wire::Bye{}));
  const std::lock_guard lock(mutex_);
  closing_ = true;
  wake_sender_.send(zmq::message_t(), zmq::send_flags::dontwait);
}

void Connection::put(wire::Frames frames) {
  const std::lock_guard lock(mutex_);
  outbox_.push_back(std::move(frames));
  wake_sender_.send(zmq::message_t(), zmq::send_flags::dontwait);  // full: the thread is awake anyway
}

// --- the thread ------------------------------------------------------------------------------------------------

void Connection::run() {
  try {
    loop();
  } catch (const Error&) {
    end(std::current_exception());
  } catch (const std::exception& error) {
    end(retryable<ConnectionError>("lost", error.what()));
  }
  socket_.close();
}

void Connection::connect() {
  socket_.set(zmq::sockopt::linger, linger_ms);
  socket_.set(zmq::sockopt::sndhwm, 0);  // the server's limits bound what is open; waiting would hold up cancels
  socket_.set(zmq::sockopt::rcvhwm, 0);
  if (const auto& curve = options_.curve) {
    socket_.set(zmq::sockopt::curve_serverkey, curve->server_key);
    socket_.set(zmq::sockopt::curve_publickey, curve->public_key);
    socket_.set(zmq::sockopt::curve_secretkey, curve->secret_key);
  }
  if (zmq_socket_monitor(socket_.handle(), monitor_address, ZMQ_EVENT_CONNECTED | ZMQ_EVENT_CONNECT_RETRIED) != 0) {
    throw zmq::error_t();
  }
  monitor_.connect(monitor_address);
  socket_.connect(address_);
  outbox_.push_back(wire::encode(wire::Hello{{1, 1}, client_name, static_cast<bool>(options_.on_notice), true}));
}

void Connection::loop() {
  while (!ended_) {
    send_outbox();
    bool closing = false;
    {
      const std::lock_guard lock(mutex_);
      closing = closing_ && outbox_.empty();
    }
    if (closing) throw ConnectionError("closed", "the client was closed");
    zmq::pollitem_t items[] = {{socket_.handle(), 0, ZMQ_POLLIN, 0}, {wake_receiver_.handle(), 0, ZMQ_POLLIN, 0}};
    zmq::poll(items, 2, until_tick());
    zmq::message_t woken;
    while (wake_receiver_.recv(woken, zmq::recv_flags::dontwait)) {
    }
    receive();
    tick();
  }
}

void Connection::send_outbox() {
  for (;;) {
    wire::Frames frames;
    {
      const std::lock_guard lock(mutex_);
      if (outbox_.empty()) return;
      frames = std::move(outbox_.front());
      outbox_.pop_front();
    }
    socket_.send(zmq::buffer(frames[0]), zmq::send_flags::sndmore);
    socket_.send(zmq::buffer(frames[1]), zmq::send_flags::none);
  }
}

void Connection::receive() {
  std::vector<zmq::message_t> messages;
  while (!ended_ && zmq::recv_multipart(socket_, std::back_inserter(messages), zmq::recv_flags::dontwait)) {
    last_heard_ = Clock::now();
    std::vector<std::string_view> frames;
    for (const zmq::message_t& message : messages) frames.push_back(message.to_string_view());
    if (auto message = wire::decode(frames)) take(std::move(*message));
    messages.clear();
  }
}

void Connection::take(wire::ServerMessage message) {
  std::visit(
      [this](auto&& each) {
        using Message = std::decay_t<decltype(each)>;
        if constexpr (std::is_same_v<Message, Welcome>) {
          if (!welcomed_.exchange(true)) welcome_promise_.set_value(std::move(each));
        } else if constexpr (std::is_same_v<Message, wire::Accepted>) {
          if (const auto request = find(each.id, false)) request->take(std::move(each));
        } else if constexpr (std::is_same_v<Message, wire::Delta>) {
          take_delta(std::move(each));
        } else if constexpr (std::is_same_v<Message, wire::Deltas>) {
          for (wire::Delta& delta : each.items) take_delta(std::move(delta));
        } else if constexpr (std::is_same_v<Message, wire::Done>) {
          if (const auto request = find(each.id, true)) request->take(std::move(each));
        } else if constexpr (std::is_same_v<Message, wire::ErrorMessage>) {
          take_error(each);
        } else if constexpr (std::is_same_v<Message, wire::Ping>) {
          check_instance(each.instance);
          put(wire::encode(wire::Pong{each.t, ""}));
        } else if constexpr (std::is_same_v<Message, wire::Pong>) {
          check_instance(each.instance);
        } else if constexpr (std::is_same_v<Message, wire::Draining>) {
          if (options_.on_draining) options_.on_draining(milliseconds(each.grace_ms));
        } else if constexpr (std::is_same_v<Message, wire::Notice>) {
          if (options_.on_notice) options_.on_notice(each.text);
        } else {
          constexpr bool is_stats = std::is_same_v<Message, Stats>;
          const std::lock_guard lock(mutex_);
          auto& asked = [this]() -> auto& {
            if constexpr (is_stats) {
              return asked_stats_;
            } else {
              return asked_health_;
            }
          }();
          if (asked.empty()) return;
          asked.front().set_value(std::move(each));
          asked.pop_front();
        }
      },
      std::move(message));
}

void Connection::take_delta(wire::Delta delta) {
  const auto id = delta.id;
  if (const auto request = find(id, false); request && !request->take(std::move(delta))) cancel(id);
}

void Connection::take_error(const wire::ErrorMessage& message) {
  if (message.code == "no_session") {
    throw ConnectionError("no_session", "the server does not know the session: it was restarted", true);
  }
  std::optional<milliseconds> retry_after;
  if (message.retry_after_ms) retry_after = milliseconds(*message.retry_after_ms);
  const RequestError error(message.code, message.message, message.retryable, retry_after);
  if (message.id) {
    if (const auto request = find(*message.id, true)) request->fail(std::make_exception_ptr(error));
  } else if (!welcomed_) {
    throw error;  // of hello: unsupported_version
  } else if (message.about == "stats_request" || message.about == "health_request") {
    const std::lock_guard lock(mutex_);
    const auto refuse = [&](auto& asked) {
      if (asked.empty()) return;
      asked.front().set_exception(std::make_exception_ptr(error));
      asked.pop_front();
    };
    message.about == "stats_request" ? refuse(asked_stats_) : refuse(asked_health_);
  }
  // Any other error without an id ends nothing.
}

void Connection::check_instance(const std::string& instance) {
  if (!instance.empty() && welcomed_ && instance != welcome_.get().instance) {
    throw ConnectionError("no_session", "another server answers at the address", true);
  }
}

std::shared_ptr<OpenRequest> Connection::find(std::uint64_t id, bool ends) {
  const std::lock_guard lock(mutex_);
  const auto found = open_.find(id);
  if (found == open_.end()) return nullptr;
  auto request = found->second;
  if (ends) open_.erase(found);
  return request;
}

bool Connection::busy() {
  const std::lock_guard lock(mutex_);
  return !open_.empty() || !asked_stats_.empty() || !asked_health_.empty();
}

milliseconds Connection::until_tick() {
  if (!welcomed_) return milliseconds(std::min<std::int64_t>(50, options_.connect_timeout.count()));
  if (!busy()) return milliseconds(-1);
  return milliseconds(welcome_.get().heartbeat_ms);
}

/// libzmq tries again for ever where nobody listens, which is most often a server that was not started.
void Connection::watch_refusals() {
  std::vector<zmq::message_t> event;
  while (zmq::recv_multipart(monitor_, std::back_inserter(event), zmq::recv_flags::dontwait)) {
    std::uint16_t number = 0;
    std::memcpy(&number, event.at(0).data(), sizeof number);
    if (number == ZMQ_EVENT_CONNECTED) refused_.reset();
    if (number == ZMQ_EVENT_CONNECT_RETRIED && !refused_) refused_ = Clock::now();
    event.clear();
  }
}

void Connection::tick() {
  const auto now = Clock::now();
  if (!welcomed_) {
    watch_refusals();
    const bool is_late = now - began_ >= options_.connect_timeout;
    if (refused_ && !was_there_ && (is_late || now - *refused_ > refused_limit)) {
      throw ConnectionError("refused",
                            "nothing listens at " + address_ +
                                ": start a server there with `graphgen serve`, or give the address of one that runs",
                            true);
    }
    if (!is_late) return;
    throw ConnectionError("timeout",
                          "no welcome from " + address_ + " within " +
                              std::to_string(options_.connect_timeout.count()) +
                              " ms: is the server running, and is this client's key let in?",
                          true);
  }
  if (!busy()) {
    last_heard_ = last_tick_ = now;
    return;
  }
  const milliseconds heartbeat(welcome_.get().heartbeat_ms);
  if (now - last_tick_ < heartbeat) return;
  if (now - last_tick_ > 2 * heartbeat) last_heard_ = now;  // this program stood still, not the server
  last_tick_ = now;
  const auto silent = std::chrono::duration_cast<milliseconds>(now - last_heard_);
  if (silent > options_.lost_after) {
    throw ConnectionError("lost", "the server was silent for " + std::to_string(silent.count()) + " ms", true);
  }
  if (silent > patience_heartbeats * heartbeat) put(wire::encode(wire::Ping{}));
}

void Connection::end(std::exception_ptr reason) {
  std::map<std::uint64_t, std::shared_ptr<OpenRequest>> open;
  {
    const std::lock_guard lock(mutex_);
    ended_ = true;
    end_reason_ = reason;
    open.swap(open_);
    for (auto& asked : asked_stats_) asked.set_exception(reason);
    for (auto& asked : asked_health_) asked.set_exception(reason);
    asked_stats_.clear();
    asked_health_.clear();
  }
  if (!welcomed_.exchange(true)) welcome_promise_.set_exception(reason);
  for (const auto& entry : open) entry.second->fail(reason);
}

}  // namespace graphgen

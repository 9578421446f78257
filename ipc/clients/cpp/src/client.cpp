/// The public classes. Owns the connection of the moment, and when a request is asked again. See graphgen/client.hpp.
#include "graphgen/client.hpp"

#include <atomic>
#include <mutex>
#include <utility>

#include "connection.hpp"
#include "open_request.hpp"

namespace graphgen {

/// Shared by a client and its streams: the first call connects, and one after a loss connects again.
class ConnectionSource {
 public:
  ConnectionSource(std::string address, ClientOptions options)
      : address_(std::move(address)), options_(std::move(options)) {}

  /// One that was welcomed. Throws ConnectionError.
  std::shared_ptr<Connection> connected() {
    std::shared_ptr<Connection> connection;
    {
      const std::lock_guard lock(mutex_);
      if (closed_) throw ConnectionError("closed", "the client was closed: make a new one");
      if (!connection_ || connection_->ended()) connection_ = std::make_shared<Connection>(address_, options_, was_there_);
      connection = connection_;
    }
    connection->welcome();
    was_there_ = true;
    return connection;
  }

  void close() {
    std::shared_ptr<Connection> connection;
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
      connection = std::move(connection_);
    }
    if (connection) connection->close();
  }

 private:
  const std::string address_;
  const ClientOptions options_;
  std::mutex mutex_;
  std::shared_ptr<Connection> connection_;
  bool closed_ = false;
  std::atomic<bool> was_there_ = false;  // the server, once
};

namespace {

/// Nothing of it was ever done, by a server that has forgotten the session: it may be asked again, of the one that is
/// there now.
bool may_repeat(const OpenRequest& request) {
  if (!request.error || request.begun || request.repeated) return false;
  try {
    std::rethrow_exception(request.error);
  } catch (const ConnectionError& error) {
    return error.code() == "no_session";
  } catch (...) {
    return false;
  }
}

}  // namespace

// --- Stream ----------------------------------------------------------------------------------------------------

Stream::Stream(std::shared_ptr<ConnectionSource> source, std::shared_ptr<OpenRequest> request)
    : source_(std::move(source)), request_(std::move(request)) {}

Stream::Stream(Stream&&) noexcept = default;

Stream& Stream::operator=(Stream&& other) noexcept {
  std::swap(source_, other.source_);
  std::swap(request_, other.request_);
  return *this;
}

Stream::~Stream() {
  if (!request_) return;
  {
    const std::lock_guard lock(request_->mutex);
    if (request_->ended) return;
    request_->left = true;
    request_->pieces.clear();
  }
  cancel();
}

std::optional<Piece> Stream::next() {
  std::unique_lock lock(request_->mutex);
  for (;;) {
    request_->changed.wait(lock, [this] { return !request_->pieces.empty() || request_->ended; });
    if (!request_->pieces.empty()) {
      Piece piece = std::move(request_->pieces.front());
      request_->pieces.pop_front();
      return piece;
    }
    if (!may_repeat(*request_)) break;
    request_->repeated = true;
    request_->ended = false;
    request_->error = nullptr;
    lock.unlock();
    try {
      source_->connected()->send(request_);
    } catch (...) {
      request_->fail(std::current_exception());
    }
    lock.lock();
  }
  if (request_->error) std::rethrow_exception(request_->error);
  return std::nullopt;
}

std::vector<Output> Stream::outputs() {
  std::vector<Output> outputs;
  while (auto piece = next()) {
    if (outputs.size() <= piece->sample) outputs.resize(piece->sample + 1);
    Output& output = outputs[piece->sample];
    output.text += piece->text;
    output.ids.insert(output.ids.end(), piece->ids.begin(), piece->ids.end());
    output.logprobs.insert(output.logprobs.end(), piece->logprobs.begin(), piece->logprobs.end());
    if (!piece->prompt_logprobs.empty()) output.prompt_logprobs = std::move(piece->prompt_logprobs);
    if (piece->finish) output.finish = *piece->finish;
  }
  return outputs;
}

void Stream::cancel() {
  std::shared_ptr<Connection> connection;
  std::uint64_t id = 0;
  {
    const std::lock_guard lock(request_->mutex);
    if (request_->ended) return;
    connection = request_->connection.lock();
    id = request_->id;
  }
  if (connection) connection->cancel(id);
}

const std::vector<std::string>& Stream::finish() const { return request_->finish; }
const Usage& Stream::usage() const { return request_->usage; }
const Timing& Stream::timing() const { return request_->timing; }
const TokenIds& Stream::prompt_ids() const { return request_->prompt_ids; }

// --- Client ----------------------------------------------------------------------------------------------------

Client::Client(std::string address, ClientOptions options)
    : source_(std::make_shared<ConnectionSource>(std::move(address), std::move(options))) {}

Client::~Client() {
  if (source_) source_->close();
}

Client::Client(Client&&) noexcept = default;

Client& Client::operator=(Client&& other) noexcept {
  std::swap(source_, other.source_);
  return *this;
}

Stream Client::generate(const Request& request) {
  auto open = std::make_shared<OpenRequest>(request);
  source_->connected()->send(open);
  return Stream(source_, std::move(open));
}

Welcome Client::welcome() { return source_->connected()->welcome(); }
Stats Client::stats() { return source_->connected()->stats(); }
Health Client::health() { return source_->connected()->health(); }
void Client::close() { source_->close(); }

}  // namespace graphgen

/// What can go wrong. Owns the exception tree:
///
///   Error (std::runtime_error)
///   ├── RequestError      the server refused or ended a request; code() is one of PROTOCOL.md's
///   ├── ConnectionError   there is no server, it fell silent, or the session is gone; code() says which
///   └── ProtocolError     the server sent what no server may send
///
/// Options that cannot be sent throw std::invalid_argument.
#pragma once

#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>

namespace graphgen {

class Error : public std::runtime_error {
 public:
  Error(std::string code, const std::string& message, bool retryable = false,
        std::optional<std::chrono::milliseconds> retry_after = std::nullopt)
      : std::runtime_error(code + ": " + message),
        code_(std::move(code)),
        retryable_(retryable),
        retry_after_(retry_after) {}

  const std::string& code() const noexcept { return code_; }
  /// The same call may succeed later.
  bool retryable() const noexcept { return retryable_; }
  std::optional<std::chrono::milliseconds> retry_after() const noexcept { return retry_after_; }

 private:
  std::string code_;
  bool retryable_;
  std::optional<std::chrono::milliseconds> retry_after_;
};

class RequestError : public Error {
 public:
  using Error::Error;
};

/// code() is `refused` (nothing listens at the address), `timeout`, `lost`, `no_session` or `closed`.
class ConnectionError : public Error {
 public:
  using Error::Error;
};

class ProtocolError : public Error {
 public:
  explicit ProtocolError(const std::string& message) : Error("protocol", message) {}
};

}  // namespace graphgen

/// Plays a plan against a running server and prints one line of JSON for each of its steps; the project's tests compare
/// them. `conversation PLAN.json`
#include <chrono>
#include <cstddef>
#include <fstream>
#include <functional>
#include <future>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "graphgen/client.hpp"
#include "json.hpp"

namespace {

using graphgen::Client;
using graphgen::test::json;
using graphgen::test::request_of;

template <typename Failure>
const char* kind_of(const Failure& error) {
  if (dynamic_cast<const graphgen::RequestError*>(&error)) return "RequestError";
  if (dynamic_cast<const graphgen::ProtocolError*>(&error)) return "ProtocolError";
  return "ConnectionError";
}

json told(const graphgen::Error& error) {
  json retry_after;
  if (error.retry_after()) retry_after = error.retry_after()->count();
  return {{"kind", kind_of(error)}, {"code", error.code()}, {"retryable", error.retryable()},
          {"retry_after_ms", retry_after}};
}

json read(graphgen::Stream& stream) {
  json outputs = json::array();
  for (const graphgen::Output& output : stream.outputs()) {
    outputs.push_back({{"text", output.text}, {"ids", output.ids}, {"finish", output.finish}});
  }
  return {{"outputs", outputs}, {"prompt_tokens", stream.usage().prompt_tokens},
          {"output_tokens", stream.usage().output_tokens}};
}

json generate(Client& client, const json& fields) {
  try {
    graphgen::Stream stream = client.generate(request_of(fields));
    return read(stream);
  } catch (const graphgen::Error& error) {
    return told(error);
  }
}

/// All at once, each in a thread of its own.
json streams(Client& client, const json& step) {
  std::vector<std::future<json>> running;
  for (const json& fields : step.at("requests")) {
    running.push_back(std::async(std::launch::async, [&client, &fields] { return generate(client, fields); }));
  }
  json results = json::array();
  for (auto& result : running) results.push_back(result.get());
  return results;
}

/// All at once, each in a thread of its own; a line for each piece and for each end.
json pieces(Client& client, const json& step) {
  std::mutex printing;
  const auto print = [&printing](const json& line) {
    const std::lock_guard lock(printing);
    std::cout << line.dump() << std::endl;
  };
  const auto tell = [&client, &print](std::size_t number, const json& fields) {
    json end;
    try {
      for (const graphgen::Piece& piece : client.generate(request_of(fields))) {
        print({{"stream", number}, {"ids", piece.ids}});
      }
    } catch (const graphgen::Error& error) {
      end = told(error);
    }
    print({{"stream", number}, {"end", end}});
  };
  std::vector<std::future<void>> running;
  for (const json& fields : step.at("requests")) {
    running.push_back(std::async(std::launch::async, tell, running.size(), std::cref(fields)));
  }
  for (auto& one : running) one.get();
  return json::object();
}

/// Leaves the loop after some pieces.
json cancel(Client& client, const json& step) {
  int pieces = 0;
  for (const graphgen::Piece& piece : client.generate(request_of(step.at("request")))) {
    static_cast<void>(piece);
    if (++pieces == step.at("after")) break;
  }
  return {{"pieces", pieces}};
}

/// Says on a line of its own that the stream runs, then waits for the server to drain.
json drain(Client& client, const json& step, std::future<void> drained) {
  graphgen::Stream stream = client.generate(request_of(step.at("request")));
  const auto first = stream.next();
  std::cout << json{{"running", true}}.dump() << std::endl;
  drained.wait();
  const json refused = generate(client, step.at("request"));
  json rest = read(stream);
  rest["outputs"][0]["text"] = first->text + rest["outputs"][0]["text"].get<std::string>();
  return {{"refused", refused}, {"rest", rest}};
}

/// What the client's thread was told.
class Notices {
 public:
  void add(const std::string& text) {
    const std::lock_guard lock(mutex_);
    texts_.push_back(text);
  }
  std::vector<std::string> list() {
    const std::lock_guard lock(mutex_);
    return texts_;
  }

 private:
  std::mutex mutex_;
  std::vector<std::string> texts_;
};

json play(Client& client, const json& step, std::promise<void>& draining, Notices& said) {
  const std::string what = step.at("do");
  try {
    if (what == "streams") return streams(client, step);
    if (what == "pieces") return pieces(client, step);
    if (what == "cancel") return cancel(client, step);
    if (what == "drain") return drain(client, step, draining.get_future());
    if (what == "notices") return {{"notices", said.list()}};
    if (what == "stats") return {{"open_requests", client.stats().counts.at("open_requests")}};
    if (what == "health") return {{"ready", client.health().ready}};
    std::this_thread::sleep_for(std::chrono::milliseconds(step.at("ms")));
    return json::object();
  } catch (const graphgen::Error& error) {
    return told(error);
  }
}

graphgen::ClientOptions options_of(const json& plan) {
  graphgen::ClientOptions options;
  if (plan.contains("lost_after_ms")) options.lost_after = std::chrono::milliseconds(plan["lost_after_ms"]);
  if (plan.contains("connect_timeout_ms")) {
    options.connect_timeout = std::chrono::milliseconds(plan["connect_timeout_ms"]);
  }
  if (plan.contains("curve")) {
    const json& keys = plan["curve"];
    options.curve = graphgen::CurveKeys{keys.at("serverKey"), keys.at("publicKey"), keys.at("secretKey")};
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: conversation PLAN.json\n";
    return 2;
  }
  std::ifstream file(argv[1]);
  const json plan = json::parse(file);
  std::promise<void> draining;
  graphgen::ClientOptions options = options_of(plan);
  options.on_draining = [&](std::chrono::milliseconds) { draining.set_value(); };
  Notices said;
  options.on_notice = [&](const std::string& text) { said.add(text); };
  Client client(plan.at("address"), options);
  for (const json& step : plan.at("steps")) std::cout << play(client, step, draining, said).dump() << std::endl;
}

/// Prints text as it comes from a running server. `./build/example "To be, or" [tcp://127.0.0.1:5755]`
#include <iostream>

#include "graphgen/client.hpp"

int main(int argc, char** argv) {
  graphgen::Client client(argc > 2 ? argv[2] : "tcp://127.0.0.1:5755");
  graphgen::Request request{argc > 1 ? argv[1] : "ROMEO:\n"};
  request.sampling.max_tokens = 80;
  try {
    graphgen::Stream stream = client.generate(request);
    for (const graphgen::Piece& piece : stream) std::cout << piece.text << std::flush;
    std::cout << "\n" << stream.usage().output_tokens << " tokens, " << stream.finish().front() << "\n";
  } catch (const graphgen::Error& error) {
    std::cerr << error.what() << (error.retryable() ? " (try again)" : "") << "\n";
    return 1;
  }
}

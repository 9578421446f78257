/// Whether bytes are UTF-8, as RFC 3629 has it: no overlong forms, no surrogates, nothing above 10ffff.
#pragma once

#include <cstddef>
#include <string_view>

namespace graphgen::wire {

inline bool is_utf8(std::string_view text) {
  const auto byte = [&](std::size_t place) { return static_cast<unsigned char>(text[place]); };
  for (std::size_t place = 0; place < text.size();) {
    const unsigned char first = byte(place);
    if (first < 0x80) {
      ++place;
      continue;
    }
    const std::size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4 || text.size() - place < length) return false;
    const unsigned char second = byte(place + 1);
    const unsigned char lowest = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    const unsigned char highest = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    if (second < lowest || second > highest) return false;
    for (std::size_t next = 2; next < length; ++next) {
      if ((byte(place + next) & 0xc0) != 0x80) return false;
    }
    place += length;
  }
  return true;
}

}  // namespace graphgen::wire

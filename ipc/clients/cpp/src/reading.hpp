/// A decoded map and the types of its fields. Owns the rules of the protocol that a msgpack library does not know: text
/// is UTF-8, an int is no float and lies within 2^53, the last of equal keys counts. Used by decode.cpp alone.
#pragma once

#include <cstdint>
#include <limits>
#include <msgpack.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "graphgen/messages.hpp"
#include "utf8.hpp"
#include "wire.hpp"

namespace graphgen::wire {

constexpr std::uint64_t max_int = (std::uint64_t{1} << 53) - 1;

/// A value of another type or outside its range; becomes a ProtocolError that names the message.
class BadField : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void read(const msgpack::object& value, std::uint64_t& into) {
  if (value.type != msgpack::type::POSITIVE_INTEGER || value.via.u64 > max_int) throw BadField("expected int, 0 to 2^53-1");
  into = value.via.u64;
}

inline void read(const msgpack::object& value, std::uint32_t& into) {
  std::uint64_t wide = 0;
  read(value, wide);
  if (wide > std::numeric_limits<std::int32_t>::max()) throw BadField("expected a token id, 0 to 2^31-1");
  into = static_cast<std::uint32_t>(wide);
}

inline void read(const msgpack::object& value, double& into) {
  switch (value.type) {
    case msgpack::type::POSITIVE_INTEGER: into = static_cast<double>(value.via.u64); break;
    case msgpack::type::NEGATIVE_INTEGER: into = static_cast<double>(value.via.i64); break;
    case msgpack::type::FLOAT32:
    case msgpack::type::FLOAT64: into = value.via.f64; break;
    default: throw BadField("expected float");
  }
  // Not so NaN, which is in no range.
  if (!(into >= 0 && into <= static_cast<double>(max_int))) throw BadField("expected float, 0 to 2^53-1");
}

inline void read(const msgpack::object& value, bool& into) {
  if (value.type != msgpack::type::BOOLEAN) throw BadField("expected bool");
  into = value.via.boolean;
}

inline void read(const msgpack::object& value, std::string& into) {
  if (value.type != msgpack::type::STR) throw BadField("expected str");
  const std::string_view text(value.via.str.ptr, value.via.str.size);
  if (!is_utf8(text)) throw BadField("a str is not UTF-8");
  into = text;
}

// Maps within messages; decode.cpp has them.
void read(const msgpack::object& value, Logprobs& into);
void read(const msgpack::object& value, Delta& into);
void read(const msgpack::object& value, EngineCount& into);
void read(const msgpack::object& value, Usage& into);
void read(const msgpack::object& value, Timing& into);
void read(const msgpack::object& value, Limits& into);
void read(const msgpack::object& value, SamplingDefaults& into);

template <typename Item>
void read(const msgpack::object& value, std::vector<Item>& into) {
  if (value.type != msgpack::type::ARRAY) throw BadField("expected array");
  into.resize(value.via.array.size);
  for (std::size_t place = 0; place < into.size(); ++place) read(value.via.array.ptr[place], into[place]);
}

template <typename Value>
void read(const msgpack::object& value, std::optional<Value>& into) {
  if (value.type == msgpack::type::NIL) {
    into.reset();
  } else {
    read(value, into.emplace());
  }
}

inline void read(const msgpack::object& value, Bytes& into) {
  if (value.type != msgpack::type::BIN) throw BadField("expected bin");
  into.data.assign(value.via.bin.ptr, value.via.bin.size);
}

class Map {
 public:
  explicit Map(const msgpack::object& value) {
    if (value.type != msgpack::type::MAP) throw BadField("expected map");
    map_ = value.via.map;
    for (std::size_t place = 0; place < map_.size; ++place) {
      if (map_.ptr[place].key.type != msgpack::type::STR) throw BadField("a key is not a str");
    }
  }

  template <typename Value>
  void required(std::string_view name, Value& into) const {
    if (!optional(name, into)) throw BadField(std::string(name) + ": a required field is missing");
  }

  /// Leaves the default where the field is absent.
  template <typename Value>
  bool optional(std::string_view name, Value& into) const {
    const msgpack::object* value = find(name);
    if (value == nullptr) return false;
    try {
      read(*value, into);
    } catch (const BadField& error) {
      throw BadField(std::string(name) + ": " + error.what());
    }
    return true;
  }

 private:
  const msgpack::object* find(std::string_view name) const {
    for (std::size_t place = map_.size; place-- > 0;) {  // of a key that occurs twice the last one counts
      const auto& key = map_.ptr[place].key.via.str;
      if (std::string_view(key.ptr, key.size) == name) return &map_.ptr[place].val;
    }
    return nullptr;
  }

  msgpack::object_map map_{};
};

}  // namespace graphgen::wire

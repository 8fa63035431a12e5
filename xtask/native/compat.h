// Put before every source file of mlx-c, which is written for Apple's compiler.
#pragma once

#include <sstream>
#include <string>
#include <string_view>
#include <version>

// GCC 12 has no std::format. mlx-c formats in one private header, with plain `{}` only.
#if !defined(__cpp_lib_format)
namespace std {
template <class... Args>
string format(string_view text, const Args&... args) {
  ostringstream out;
  [[maybe_unused]] auto put = [&](const auto& arg) {
    auto hole = text.find("{}");
    out << text.substr(0, hole);
    if (hole == text.npos) {
      text = {};
      return;
    }
    out << arg;
    text.remove_prefix(hole + 2);
  };
  (put(args), ...);
  out << text;
  return out.str();
}
} // namespace std
#endif

// mlx-c takes its half types from the compiler, and on Arm only. mlx-rs needs the functions they
// guard everywhere, and MLX has types of its own; so mlx-c's half.h is skipped for these.
#define MLX_HALF_H
#define HAS_FLOAT16
#define HAS_BFLOAT16
#include "mlx/types/half_types.h"
using mlx::core::bfloat16_t;
using mlx::core::float16_t;

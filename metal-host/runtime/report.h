// How the runtime says what is wrong: one line that the Rust side reads, and the end of the process.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "sanitizer.h"

namespace report {

// Where a kernel called the runtime, as clang's __builtin_source_location() lays it out.
struct Site {
  const char* file;
  const char* function;
  unsigned line, column;

  bool operator==(const Site& other) const {
    // Nearly always one and the same; a call in a template has one for each instance.
    if (this == &other) return true;
    return line == other.line && column == other.column && std::string(file) == other.file;
  }
};

// Ends the process, and may do so from any fibre.
[[noreturn]] inline void finding(const char* kind, const Site* site, const std::string& message) {
  // Made by code that is not instrumented, but checked by fprintf.
  sanitizer::mark_initialised(message.c_str(), message.size() + 1);
  fprintf(stderr, "\nmsl-finding\t%s\t%s\t%u\t%u\t%s\n", kind, site ? site->file : "",
          site ? site->line : 0, site ? site->column : 0, message.c_str());
  fflush(stderr);
  _Exit(2);
}

}  // namespace report

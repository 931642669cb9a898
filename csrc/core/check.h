// PYRT_CHECK: a condition a caller may break, reported with the op, the argument and the values.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#define PYRT_CHECK(condition, message)              \
  do {                                              \
    if (!(condition)) {                             \
      std::ostringstream pyrt_text;                 \
      pyrt_text << message;                         \
      throw std::invalid_argument(pyrt_text.str()); \
    }                                               \
  } while (false)

// What may be read of squares: checked once a call, so that no kernel has to.
#include "ops.h"

namespace pyrt {
namespace {

std::string beyond(const char* name, int64_t value, int64_t low, int64_t end) {
  return std::string(name) + " must lie in [" + std::to_string(low) + ", " + std::to_string(end) +
         "), got " + std::to_string(value);
}

}  // namespace

std::string problem(const char* name, const int32_t* rows, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    if (rows[i] < 0 || rows[i] >= end) return beyond(name, rows[i], 0, end);
  return "";
}

std::string problem(const SquaresView& squares) {
  for (int64_t i = 0; i < squares.images; ++i) {
    const int64_t* image = squares.table + 3 * i;
    const int64_t first = image[0], height = image[1], width = image[2];
    const bool none = height == 0 || width == 0 || squares.channels == 0;
    if (first < 0 || height < 0 || width < 0 || first > squares.elements ||
        (!none && height > (squares.elements - first) / width / squares.channels))
      return "image " + std::to_string(i) + " [" + std::to_string(squares.channels) + ", " +
             std::to_string(height) + ", " + std::to_string(width) + "] from element " +
             std::to_string(first) + " on exceeds the " + std::to_string(squares.elements) +
             " of pixels.data";
  }
  for (int64_t r = 0; r < squares.rows; ++r) {
    const int32_t image = squares.places[4 * r], ratio = squares.places[4 * r + 3];
    if (image < 0 || image >= squares.images) return beyond("image", image, 0, squares.images);
    if (ratio < 1 || ratio > kMaxRatio) return beyond("ratio", ratio, 1, kMaxRatio + 1);
  }
  return "";
}

}  // namespace pyrt

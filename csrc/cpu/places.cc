// What may be read of squares: checked once a call, so that no kernel has to.
#include <sstream>

#include "ops.h"

namespace pyrt {

std::string problem(const SquaresView& squares) {
  std::ostringstream text;
  for (int64_t i = 0; i < squares.images; ++i) {
    const int64_t first = squares.table[3 * i], height = squares.table[3 * i + 1],
                  width = squares.table[3 * i + 2];
    const int64_t left = first < 0 || height < 0 || width < 0 ? -1 : squares.elements - first;
    const bool none = height == 0 || width == 0 || squares.channels == 0;
    if (left < 0 || (!none && height > left / width / squares.channels)) {
      text << "pixels.table: image " << i << ", " << squares.channels << " x " << height << " x "
           << width << " from element " << first << ", exceeds " << squares.elements << " elements";
      return text.str();
    }
  }
  for (int64_t r = 0; r < squares.rows; ++r) {
    const int32_t image = squares.places[4 * r], ratio = squares.places[4 * r + 3];
    if (image < 0 || image >= squares.images) {
      text << "image must lie in [0, " << squares.images << "), got " << image;
      return text.str();
    }
    if (ratio < 1 || ratio > kMaxRatio) {
      text << "ratio must lie in [1, " << kMaxRatio + 1 << "), got " << ratio;
      return text.str();
    }
  }
  return "";
}

}  // namespace pyrt

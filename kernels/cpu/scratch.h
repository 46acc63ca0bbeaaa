// A buffer that grows and is kept by its thread: a decode step must not allocate.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace haq {

class Scratch {
 public:
  uint8_t* get(int64_t bytes) { // throws std::bad_alloc
    if (bytes > size_) {
      const auto rounded = static_cast<size_t>((bytes + 4095) / 4096 * 4096);
      data_.reset(static_cast<uint8_t*>(std::aligned_alloc(4096, rounded)));
      size_ = data_ ? static_cast<int64_t>(rounded) : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(get(count * 4)); }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  int64_t size_ = 0;
};

} // namespace haq

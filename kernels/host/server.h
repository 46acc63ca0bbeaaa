// A process that runs kernels on request: launches come in on stdin, results go out on stdout. A process of its own,
// so that a sanitizer's report or a failed check ends it and not the test that asked.
//
// Request, text lines, buffers as raw bytes after their line:
//   launch <kernel> <grid x> <grid y> <grid z> <threads> <shared bytes> <order> <copies> <arguments>
//   int <value> | float <bits> | null | buffer <bytes>     (one line an argument)
// Reply: "ok <six counters>", then the bytes of every buffer in order.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "simt.h"

namespace simt {

enum class Kind { integer, floating, pointer };

struct Argument {
  Kind kind;
  uint64_t value = 0;  // an int or a float in its low half, or an address
  size_t bytes = 0;    // of a buffer
};

template <class T> constexpr Kind kind_of() {
  if (std::is_pointer<T>::value) return Kind::pointer;
  return std::is_same<T, float>::value ? Kind::floating : Kind::integer;
}

template <class T> T as(const Argument& argument) {
  if (argument.kind != kind_of<T>()) fail("an argument is not of the kind that the kernel declares");
  T value;
  static_assert(sizeof(T) <= 8, "arguments are pointers, ints and floats");
  memcpy(&value, &argument.value, sizeof(T));
  return value;
}

class Server {
 public:
  template <class... Parameters> void add(const char* name, void (*kernel)(Parameters...)) {
    kernels_[name] = [kernel](const Launch& launch, const std::vector<Argument>& arguments) {
      if (arguments.size() != sizeof...(Parameters)) fail("wrong number of arguments");
      call(launch, kernel, arguments, std::index_sequence_for<Parameters...>());
    };
  }

  int serve() {
    char name[128];
    Launch launch;
    unsigned order, copies, count;
    while (scanf(" launch %127s %u %u %u %u %u %u %u %u", name, &launch.grid.x, &launch.grid.y, &launch.grid.z,
                 &launch.threads, &launch.shared_bytes, &order, &copies, &count) == 9) {
      launch.order = (Order)order;
      launch.copies = (Copies)copies;
      std::vector<Argument> arguments;
      for (unsigned i = 0; i < count; i++) arguments.push_back(read_argument());
      auto found = kernels_.find(name);
      if (found == kernels_.end()) fail("no such kernel");
      found->second(launch, arguments);
      reply(arguments);
    }
    return 0;
  }

 private:
  template <class... Parameters, size_t... Index>
  static void call(const Launch& launch, void (*kernel)(Parameters...), const std::vector<Argument>& arguments,
                   std::index_sequence<Index...>) {
    auto body = [&] { kernel(as<Parameters>(arguments[Index])...); };
    run(launch, [](void* context) { (*(decltype(body)*)context)(); }, &body);
  }

  static Argument read_argument() {
    char kind[16];
    if (scanf(" %15s", kind) != 1) fail("a launch breaks off");
    Argument argument = {Kind::pointer};
    if (!strcmp(kind, "null")) return argument;
    long long number;
    if (scanf("%lld", &number) != 1) fail("a launch breaks off");
    if (strcmp(kind, "buffer")) {
      argument.kind = strcmp(kind, "int") ? Kind::floating : Kind::integer;
      argument.value = (uint32_t)number;
      return argument;
    }
    argument.bytes = (size_t)number;
    void* buffer = nullptr;  // aligned as by a GPU's allocator, and fenced by the sanitizer at its exact size
    if (posix_memalign(&buffer, 256, argument.bytes)) fail("out of memory");
    getchar();  // the end of the line
    if (fread(buffer, 1, argument.bytes, stdin) != argument.bytes) fail("a buffer breaks off");
    argument.value = (uint64_t)buffer;
    return argument;
  }

  static void reply(const std::vector<Argument>& arguments) {
    const Counters& c = counters;
    printf("ok %lld %lld %lld %lld %lld %lld\n", c.mma_multiplies, c.matrix_loads, c.bank_conflicts, c.async_bytes,
           c.dot_multiplies, c.barriers);
    for (const Argument& argument : arguments)
      if (argument.bytes) {
        fwrite((void*)argument.value, 1, argument.bytes, stdout);
        free((void*)argument.value);
      }
    fflush(stdout);
  }

  std::map<std::string, std::function<void(const Launch&, const std::vector<Argument>&)>> kernels_;
};

}  // namespace simt

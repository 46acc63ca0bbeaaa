// A process that runs kernels on request: launches come in on stdin, results go out on stdout. A process of its own,
// so that a sanitizer's report or a failed check ends it and not the test that asked.
//
// Request, text lines, buffers as raw bytes after their line:
//   launch <kernel> <grid x> <grid y> <grid z> <threads> <shared bytes> <order> <copies> <arguments>
//   int <value> | float <bits> | null | buffer <bytes>     (one line an argument)
// Reply: "ok <six counters>", then the bytes of every buffer in order.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "simt.h"

namespace simt {

enum class Kind { integer, floating, pointer };

struct Argument {
  Kind kind;
  uint64_t value;  // an int or a float in its low half, or an address
  size_t bytes;    // of a buffer
};

// A kernel whose type is forgotten: `call` knows how to give `kernel` its arguments.
struct Served {
  const char* name;
  void (*kernel)();
  size_t parameters;
  void (*call)(void (*kernel)(), const Launch& launch, const Argument* arguments);
};

void add(const Served& served);
int serve();  // until the input ends

template <class T> T as(const Argument& argument) {
  constexpr Kind kind = std::is_pointer<T>::value       ? Kind::pointer
                        : std::is_same<T, float>::value ? Kind::floating
                                                        : Kind::integer;
  if (argument.kind != kind) fail("an argument is not of the kind that the kernel declares");
  static_assert(sizeof(T) <= 8, "arguments are pointers, ints and floats");
  T value;
  memcpy(&value, &argument.value, sizeof(T));
  return value;
}

template <class... Parameters, size_t... Index>
void call(void (*kernel)(Parameters...), const Launch& launch, const Argument* arguments, std::index_sequence<Index...>) {
  auto body = [&] { kernel(as<Parameters>(arguments[Index])...); };
  run(launch, [](void* context) { (*(decltype(body)*)context)(); }, &body);
}

template <class... Parameters> void serves(const char* name, void (*kernel)(Parameters...)) {
  add({name, (void (*)())kernel, sizeof...(Parameters),
       [](void (*untyped)(), const Launch& launch, const Argument* arguments) {
         auto* typed = (void (*)(Parameters...))untyped;
         call(typed, launch, arguments, std::index_sequence_for<Parameters...>());
       }});
}

}  // namespace simt

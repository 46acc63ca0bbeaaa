#include "server.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace simt {
namespace {

std::vector<Served> kernels;

Argument read_argument() {
  char kind[16];
  if (scanf(" %15s", kind) != 1) fail("a launch breaks off");
  if (!strcmp(kind, "null")) return {Kind::pointer, 0, 0};
  long long number;
  if (scanf("%lld", &number) != 1) fail("a launch breaks off");
  if (!strcmp(kind, "int")) return {Kind::integer, (uint32_t)number, 0};
  if (!strcmp(kind, "float")) return {Kind::floating, (uint32_t)number, 0};
  auto bytes = (size_t)number;
  void* buffer = nullptr;  // aligned as by a GPU's allocator, and fenced by the sanitizer at its exact size
  if (posix_memalign(&buffer, 256, bytes)) fail("out of memory");
  getchar();  // the end of the line
  if (fread(buffer, 1, bytes, stdin) != bytes) fail("a buffer breaks off");
  return {Kind::pointer, (uint64_t)buffer, bytes};
}

void execute(const char* name, const Launch& launch, const std::vector<Argument>& arguments) {
  for (const Served& served : kernels)
    if (!strcmp(served.name, name)) {
      if (served.parameters != arguments.size()) fail("wrong number of arguments");
      served.call(served.kernel, launch, arguments.data());
      return;
    }
  fail("no such kernel");
}

void reply(const std::vector<Argument>& arguments) {
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

}  // namespace

void add(const Served& served) { kernels.push_back(served); }

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
    execute(name, launch, arguments);
    reply(arguments);
  }
  return 0;
}

}  // namespace simt

// The program that runs kernels: loads one, reads a job, runs it, writes the outputs.
//
//   runner KERNEL JOB OUTPUT
//
// KERNEL is a library with the function `msl_entry`. JOB is a `Header`, then for each buffer a `BufferHeader` and,
// of an input or a filled output, its bytes. OUTPUT gets the bytes of the outputs, then those of written inputs. Exit code 2:
// a finding, told on stderr; 3: the job makes no sense.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "dispatch.h"
#include "group.h"

struct Header {
  Extent grid, group;
  uint64_t schedule;
  uint32_t poison;
  uint32_t buffers;
};
static_assert(sizeof(Header) == 40);

enum Kind : uint64_t { kInput = 0, kOutput = 1, kFilledOutput = 2, kWrittenInput = 3 };

struct BufferHeader {
  uint64_t kind;
  uint64_t bytes;
};

struct Buffer {
  BufferHeader header;
  // Of exactly its size, so that AddressSanitizer sees an overrun of one byte.
  void* memory;
};

[[noreturn]] static void give_up(const char* why) {
  fprintf(stderr, "runner: %s\n", why);
  _Exit(3);
}

static void read(FILE* job, void* target, size_t bytes) {
  if (fread(target, 1, bytes, job) != bytes) give_up("the job is cut short");
}

static Buffer read_buffer(FILE* job, uint8_t poison) {
  Buffer buffer;
  read(job, &buffer.header, sizeof buffer.header);
  size_t bytes = buffer.header.bytes;
  buffer.memory = malloc(bytes ? bytes : 1);
  if (!buffer.memory) give_up("out of memory");
  if (buffer.header.kind == kOutput) {
    sanitizer::fill(buffer.memory, poison, bytes);
    sanitizer::mark_uninitialised(buffer.memory, bytes);
  } else {
    read(job, buffer.memory, bytes);
    sanitizer::mark_initialised(buffer.memory, bytes);
  }
  return buffer;
}

static MslEntry load(const char* path) {
  void* library = dlopen(path, RTLD_NOW);
  if (!library) give_up(dlerror());
  void* entry = dlsym(library, "msl_entry");
  if (!entry) give_up("the kernel has no entry");
  return reinterpret_cast<MslEntry>(entry);
}

static void run(MslEntry entry, const Header& header, const std::vector<Buffer>& buffers) {
  std::vector<unsigned long> addresses;
  for (const Buffer& buffer : buffers) {
    addresses.push_back(reinterpret_cast<unsigned long>(buffer.memory));
  }
  sanitizer::mark_initialised(addresses.data(), addresses.size() * sizeof addresses[0]);

  Schedule schedule(header.schedule);
  ThreadgroupMemory memory(static_cast<uint8_t>(header.poison));
  memory.clear();
  Group group(entry, addresses.data(), schedule, memory);
  the_group = &group;
  Dispatch dispatch(header.grid, header.group);
  std::vector<uint64_t> order = dispatch.groups();
  schedule.arrange(order);
  for (uint64_t index : order) group.run(dispatch.ids(index));
  group.finish();
}

static void write_buffer(FILE* file, const Buffer& buffer, unsigned place) {
  size_t bytes = buffer.header.bytes;
  long byte = sanitizer::first_uninitialised(buffer.memory, bytes);
  if (byte >= 0) {
    sanitizer::tell_origin(static_cast<char*>(buffer.memory) + byte);
    report::finding("output", nullptr, std::to_string(place) + " " + std::to_string(byte));
  }
  if (fwrite(buffer.memory, 1, bytes, file) != bytes) give_up("cannot write the outputs");
}

static void write_outputs(const char* path, const std::vector<Buffer>& buffers) {
  FILE* file = fopen(path, "wb");
  if (!file) give_up("cannot write the outputs");
  unsigned place = 0;
  for (const Buffer& buffer : buffers) {
    if (buffer.header.kind == kOutput || buffer.header.kind == kFilledOutput) write_buffer(file, buffer, place++);
  }
  for (const Buffer& buffer : buffers) {
    if (buffer.header.kind == kWrittenInput) write_buffer(file, buffer, place++);
  }
  if (fclose(file) != 0) give_up("cannot write the outputs");
}

int main(int count, char** arguments) {
  if (count != 4) give_up("three arguments are needed");
  MslEntry entry = load(arguments[1]);
  FILE* job = fopen(arguments[2], "rb");
  if (!job) give_up("cannot read the job");
  Header header;
  read(job, &header, sizeof header);
  std::vector<Buffer> buffers;
  for (uint32_t i = 0; i < header.buffers; i++) {
    buffers.push_back(read_buffer(job, static_cast<uint8_t>(header.poison)));
  }
  fclose(job);
  run(entry, header, buffers);
  write_outputs(arguments[3], buffers);
  // What is left is the system's to free; a sanitizer's own checks at exit are not wanted.
  _Exit(0);
}

// ---- what kernels call ----

extern "C" {
void* msl_threadgroup_array(unsigned id, unsigned long bytes, unsigned long limit, const report::Site* site) {
  return the_group->memory().array(id, bytes, limit, site);
}
void msl_threadgroup_barrier(unsigned flags, const report::Site* site) {
  the_group->threadgroup_barrier(flags, site);
}
void msl_simdgroup_barrier(unsigned flags, const report::Site* site) {
  the_group->simdgroup_barrier(flags, site);
}
void msl_gather(const void* value, unsigned bytes, void** lanes, unsigned* mask,
                const report::Site* site) {
  the_group->gather(value, bytes, lanes, mask, site);
}
bool msl_is_first() { return the_group->is_first(); }
unsigned msl_lane() { return the_group->current().lane(); }

// clang calls these to round to bfloat, and the compiler's library of older systems lacks them.
__attribute__((weak)) __bf16 __truncsfbf2(float value) {
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  uint32_t to_even = 0x7fff + (bits >> 16 & 1);
  uint16_t rounded = is_nan ? bits >> 16 | 0x40 : (bits + to_even) >> 16;
  return __builtin_bit_cast(__bf16, rounded);
}
__attribute__((weak)) __bf16 __truncdfbf2(double value) {
  return __truncsfbf2(static_cast<float>(value));
}
}

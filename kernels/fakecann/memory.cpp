// Device memory is host memory, counted per device against FAKECANN_HBM_GIB; new blocks hold NaN, not zeros.
#include "fakecann.h"

#include <acl/acl.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace fakecann {
namespace {

constexpr size_t ALIGNMENT = 512;
constexpr size_t POISONED = size_t{64} << 20;  // larger blocks are left alone: writing them would claim host memory

struct Block {
  size_t bytes;
  int device;
};

std::mutex mutex;
std::map<const char*, Block> blocks;
size_t used[64];

aclError allocate(void** data, size_t bytes) {
  int device = current_device();
  std::lock_guard<std::mutex> lock(mutex);
  if (used[device] + bytes > settings().hbm_bytes) {
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION,
                "device " + std::to_string(device) + " has no " + std::to_string(bytes) + " bytes left");
  }
  if (int code = aclrtMallocHost(data, bytes)) return fail(code, "the host has no memory left");
  if (bytes <= POISONED) std::memset(*data, 0xff, bytes);  // NaN in every floating-point type
  used[device] += bytes;
  blocks[static_cast<char*>(*data)] = {bytes, device};
  return ACL_SUCCESS;
}

}  // namespace

bool owns(const void* data, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  auto next = blocks.upper_bound(static_cast<const char*>(data));
  if (next == blocks.begin()) return false;
  const auto& [start, block] = *std::prev(next);
  return static_cast<const char*>(data) + bytes <= start + block.bytes;
}

}  // namespace fakecann

using namespace fakecann;

extern "C" {

aclError aclrtMalloc(void** data, size_t bytes, aclrtMemMallocPolicy) { return allocate(data, bytes); }

aclError aclrtFree(void* data) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.find(static_cast<char*>(data));
  if (found == blocks.end()) return fail(ACL_ERROR_RT_MEMORY_FREE, "freed memory that is not a block of the device");
  used[found->second.device] -= found->second.bytes;
  blocks.erase(found);
  return aclrtFreeHost(data);
}

aclError aclrtMallocHost(void** data, size_t bytes) {
  return posix_memalign(data, ALIGNMENT, bytes ? bytes : ALIGNMENT) ? ACL_ERROR_RT_MEMORY_ALLOCATION : ACL_SUCCESS;
}

aclError aclrtFreeHost(void* data) {
  std::free(data);
  return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  std::lock_guard<std::mutex> lock(mutex);
  *total = settings().hbm_bytes;
  return give(free, *total - used[current_device()]);
}

aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind) {
  if (int code = pending_error(true)) return code;
  if (bytes > room) return fail(ACL_ERROR_RT_PARAM_INVALID, "a copy is larger than its destination");
  std::memmove(to, from, bytes);
  return ACL_SUCCESS;
}

aclError aclrtMemset(void* data, size_t room, int32_t value, size_t bytes) {
  if (bytes > room) return fail(ACL_ERROR_RT_PARAM_INVALID, "a fill is larger than its destination");
  std::memset(data, value, bytes);
  return ACL_SUCCESS;
}

}  // extern "C"

// The stream, their last argument, is not read; all memory is aligned.
SAME_AS(aclrtMemcpy, aclrtMemcpyAsync) SAME_AS(aclrtMemcpy, aclrtMemcpyAsyncWithCondition)
SAME_AS(aclrtMemset, aclrtMemsetAsync) SAME_AS(aclrtMalloc, aclrtMallocAlign32)

// Collectives between processes of one machine through shared memory, behind the C interface of HCCL.
//
// Every rank owns one area; a collective is: write my area, wait for all, read the others', wait for all.
// Point-to-point messages go through one mailbox per pair of ranks. A rank that ended, or does not come within
// FAKECANN_TIMEOUT_S, is an error for the others that names it. On the real device a collective is asynchronous, here
// it is done on return.
#include "fakecann.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <acl/acl.h>
#include <fcntl.h>
#include <hccl/hccl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <random>

using namespace fakecann;

namespace {

constexpr uint32_t MOST_RANKS = 16;
constexpr size_t AREA = size_t{32} << 20, HEADER = size_t{1} << 16;

struct Shared {
  std::atomic<uint32_t> arrived, round;
  std::atomic<int> pids[MOST_RANKS];
  std::atomic<uint64_t> here[MOST_RANKS];  // barriers that each rank has reached
  std::atomic<uint64_t> sent[MOST_RANKS][MOST_RANKS], taken[MOST_RANKS][MOST_RANKS];
};
static_assert(sizeof(Shared) <= HEADER);

struct Communicator {
  uint32_t size, rank;
  std::string name;
  long collectives = 0;
  char* base = nullptr;
  Shared* shared = nullptr;

  char* area(uint32_t owner) const { return base + HEADER + owner * AREA; }
  char* mailbox(uint32_t from, uint32_t to) const { return base + HEADER + (size + from * size + to) * AREA; }
};

// Whether a process still runs; one that ended and waits for its parent does not.
bool alive(int pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  std::getline(file, line);
  auto end = line.rfind(')');
  return end != std::string::npos && line[end + 2] != 'Z' && line[end + 2] != 'X';
}

// Waits until `ready`; else the error says which rank is missing: one that `absent` is true of.
template <typename Ready, typename Absent>
HcclResult wait(Communicator* group, Ready ready, Absent absent) {
  auto start = std::chrono::steady_clock::now();
  for (long spins = 0; !ready(); spins++) {
    usleep(spins < 100 ? 20 : 200);
    if (spins % 64) continue;
    bool late = std::chrono::steady_clock::now() - start > std::chrono::seconds(settings().timeout_s);
    for (uint32_t rank = 0; rank < group->size; rank++) {
      int pid = group->shared->pids[rank];
      bool ended = pid && !alive(pid);
      if (!absent(rank) || ready() || !(ended || late)) continue;
      fail(0, "rank " + std::to_string(rank) + (ended ? " has ended" : " did not arrive in time") + "; rank " +
                  std::to_string(group->rank) + " was waiting for it in a collective of " + group->name);
      return ended ? HCCL_E_REMOTE : HCCL_E_TIMEOUT;
    }
  }
  return HCCL_SUCCESS;
}

HcclResult barrier(Communicator* group) {
  Shared* shared = group->shared;
  uint32_t round = shared->round;
  uint64_t mine = ++shared->here[group->rank];
  if (shared->arrived.fetch_add(1) + 1 == group->size) {
    shared->arrived = 0;
    shared->round++;
    return HCCL_SUCCESS;
  }
  return wait(group, [=] { return shared->round != round; }, [=](uint32_t rank) { return shared->here[rank] < mine; });
}

#define TRY(CALL) \
  if (HcclResult code = (CALL)) return code

HcclResult join(Communicator* group) {
  if (group->size > MOST_RANKS) {
    fail(0, "a group of " + std::to_string(group->size) + " ranks; the emulator takes " + std::to_string(MOST_RANKS));
    return HCCL_E_NOT_SUPPORT;
  }
  std::string path = "/dev/shm/fakecann_" + group->name;
  size_t bytes = HEADER + (group->size + group->size * group->size) * AREA;
  int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, static_cast<off_t>(bytes))) return HCCL_E_SYSCALL;
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  close(file);
  if (data == MAP_FAILED) return HCCL_E_MEMORY;
  group->base = static_cast<char*>(data);
  group->shared = static_cast<Shared*>(data);
  group->shared->pids[group->rank] = getpid();
  TRY(barrier(group));
  if (group->rank == 0) unlink(path.c_str());
  return HCCL_SUCCESS;
}

// Counts a collective, and carries out the fault that is due on this rank.
HcclResult begin(Communicator* group, const char* name) {
  trace(name);
  const Fault& due = fault();
  bool here = due.rank == static_cast<long>(group->rank) && ++group->collectives == due.count;
  if (here && due.kind == "exit") _exit(1);
  if (here && due.kind == "hang") sleep(static_cast<unsigned>(settings().timeout_s) * 10);
  return pending_error(false) ? HCCL_E_RUNTIME : HCCL_SUCCESS;
}

at::ScalarType type_of(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
      return at::kChar;
    case HCCL_DATA_TYPE_INT16:
      return at::kShort;
    case HCCL_DATA_TYPE_INT32:
      return at::kInt;
    case HCCL_DATA_TYPE_INT64:
      return at::kLong;
    case HCCL_DATA_TYPE_UINT8:
      return at::kByte;
    case HCCL_DATA_TYPE_FP16:
      return at::kHalf;
    case HCCL_DATA_TYPE_BFP16:
      return at::kBFloat16;
    case HCCL_DATA_TYPE_FP32:
      return at::kFloat;
    case HCCL_DATA_TYPE_FP64:
      return at::kDouble;
    default:
      TORCH_CHECK(false, "no collective takes the data type with number ", static_cast<int>(type));
  }
}

size_t width_of(HcclDataType type) { return c10::elementSize(type_of(type)); }

void reduce(const at::Tensor& into, const at::Tensor& other, HcclReduceOp op) {
  if (op == HCCL_REDUCE_SUM) into.add_(other);
  if (op == HCCL_REDUCE_PROD) into.mul_(other);
  if (op == HCCL_REDUCE_MAX) into.copy_(at::maximum(into, other));
  if (op == HCCL_REDUCE_MIN) into.copy_(at::minimum(into, other));
}

// Reduces `count` elements at byte `offset` of every rank's area, in the order of ranks.
at::Tensor reduced(Communicator* group, size_t offset, size_t count, HcclDataType type, HcclReduceOp op) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  auto part = [&](uint32_t rank) {
    return at::from_blob(group->area(rank) + offset, {static_cast<int64_t>(count)}, type_of(type));
  };
  at::Tensor result = part(0).clone();
  for (uint32_t rank = 1; rank < group->size; rank++) reduce(result, part(rank), op);
  return result;
}

// One side of a point-to-point message; what is left of it is in `data` and `bytes`.
struct Message {
  bool sends;
  char* data;
  size_t bytes;
  uint32_t peer;
};

// Moves the next part of a message through the mailbox, if it is free (to send) or full (to receive).
bool advance(Communicator* group, Message& message) {
  uint32_t from = message.sends ? group->rank : message.peer, to = message.sends ? message.peer : group->rank;
  auto &sent = group->shared->sent[from][to], &taken = group->shared->taken[from][to];
  if (message.sends ? sent != taken : sent == taken) return false;
  size_t part = std::min(AREA, message.bytes);
  char* box = group->mailbox(from, to);
  std::memcpy(message.sends ? box : message.data, message.sends ? message.data : box, part);
  (message.sends ? sent : taken)++;
  message.data += part, message.bytes -= part;
  return true;
}

// All messages move side by side, part by part, so that a ring of ranks that all send first does not stand still.
HcclResult exchange(Communicator* group, std::vector<Message> messages) {
  auto open = [](const Message& message) { return message.bytes > 0; };
  while (std::any_of(messages.begin(), messages.end(), open)) {
    bool moved = false;
    auto ready = [&] {
      for (auto& message : messages) moved = (open(message) && advance(group, message)) || moved;
      return moved;
    };
    auto absent = [&](uint32_t rank) {
      return std::any_of(messages.begin(), messages.end(), [&](auto& m) { return open(m) && m.peer == rank; });
    };
    TRY(wait(group, ready, absent));
  }
  return HCCL_SUCCESS;
}

Communicator* group_of(HcclComm handle) { return static_cast<Communicator*>(handle); }

}  // namespace

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo* root) {
  std::random_device random;
  std::snprintf(root->internal, sizeof root->internal, "%d_%08x%08x", getpid(), random(), random());
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo* root, uint32_t rank, HcclComm* handle) {
  auto* group = new Communicator{size, rank, root->internal};
  *handle = group;
  return join(group);
}

HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo* root, uint32_t rank, const HcclCommConfig*,
                                      HcclComm* handle) {
  return HcclCommInitRootInfo(size, root, rank, handle);
}

HcclResult HcclCreateSubCommConfig(HcclComm* parent, uint32_t size, uint32_t*, uint64_t id, uint32_t rank,
                                   HcclCommConfig*, HcclComm* handle) {
  auto* group = new Communicator{size, rank, group_of(*parent)->name + "_" + std::to_string(id)};
  *handle = group;
  return join(group);
}

HcclResult HcclCommDestroy(HcclComm handle) {
  auto* group = group_of(handle);
  munmap(group->base, HEADER + (group->size + group->size * group->size) * AREA);
  delete group;
  return HCCL_SUCCESS;
}

uint32_t HcclGetCommConfigCapability() { return 0; }
HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }
const char* HcclGetErrorString(HcclResult) { return aclGetRecentErrMsg(); }

HcclResult HcclGetCommAsyncError(HcclComm, HcclResult* code) {
  *code = HCCL_SUCCESS;
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm handle, char* name) {
  std::snprintf(name, COMM_NAME_MAX_LENGTH, "fakecann_%s", group_of(handle)->name.c_str());
  return HCCL_SUCCESS;
}

HcclResult HcclGetRankSize(HcclComm handle, uint32_t* size) {
  *size = group_of(handle)->size;
  return HCCL_SUCCESS;
}

HcclResult HcclGetRankId(HcclComm handle, uint32_t* rank) {
  *rank = group_of(handle)->rank;
  return HCCL_SUCCESS;
}

HcclResult HcclBarrier(HcclComm handle, aclrtStream) {
  TRY(begin(group_of(handle), "HcclBarrier"));
  return barrier(group_of(handle));
}

HcclResult HcclAllReduce(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm handle,
                         aclrtStream) {
  auto* group = group_of(handle);
  TRY(begin(group, "HcclAllReduce"));
  size_t width = width_of(type), most = AREA / width;
  for (uint64_t start = 0; start < count; start += most) {
    size_t part = std::min<uint64_t>(most, count - start);
    std::memcpy(group->area(group->rank), static_cast<char*>(send) + start * width, part * width);
    TRY(barrier(group));
    at::Tensor result = reduced(group, 0, part, type, op);
    TRY(barrier(group));
    std::memcpy(static_cast<char*>(receive) + start * width, result.data_ptr(), part * width);
  }
  return HCCL_SUCCESS;
}

HcclResult HcclReduce(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, uint32_t root,
                      HcclComm handle, aclrtStream stream) {
  std::vector<char> unused(group_of(handle)->rank == root ? 0 : count * width_of(type));
  return HcclAllReduce(send, unused.empty() ? receive : unused.data(), count, type, op, handle, stream);
}

HcclResult HcclReduceScatter(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op,
                             HcclComm handle, aclrtStream) {
  auto* group = group_of(handle);
  TRY(begin(group, "HcclReduceScatter"));
  size_t width = width_of(type), most = AREA / width / group->size;
  for (uint64_t start = 0; start < count; start += most) {
    size_t part = std::min<uint64_t>(most, count - start);
    for (uint32_t rank = 0; rank < group->size; rank++) {
      std::memcpy(group->area(group->rank) + rank * part * width,
                  static_cast<char*>(send) + (rank * count + start) * width, part * width);
    }
    TRY(barrier(group));
    at::Tensor result = reduced(group, group->rank * part * width, part, type, op);
    TRY(barrier(group));
    std::memcpy(static_cast<char*>(receive) + start * width, result.data_ptr(), part * width);
  }
  return HCCL_SUCCESS;
}

HcclResult HcclBroadcast(void* data, uint64_t count, HcclDataType type, uint32_t root, HcclComm handle, aclrtStream) {
  auto* group = group_of(handle);
  TRY(begin(group, "HcclBroadcast"));
  size_t bytes = count * width_of(type);
  for (size_t start = 0; start < bytes; start += AREA) {
    size_t part = std::min(AREA, bytes - start);
    char* place = static_cast<char*>(data) + start;
    if (group->rank == root) std::memcpy(group->area(root), place, part);
    TRY(barrier(group));
    if (group->rank != root) std::memcpy(place, group->area(root), part);
    TRY(barrier(group));
  }
  return HCCL_SUCCESS;
}

HcclResult HcclAllGather(void* send, void* receive, uint64_t count, HcclDataType type, HcclComm handle, aclrtStream) {
  auto* group = group_of(handle);
  TRY(begin(group, "HcclAllGather"));
  size_t bytes = count * width_of(type);
  for (size_t start = 0; start < bytes; start += AREA) {
    size_t part = std::min(AREA, bytes - start);
    std::memcpy(group->area(group->rank), static_cast<char*>(send) + start, part);
    TRY(barrier(group));
    for (uint32_t rank = 0; rank < group->size; rank++) {
      std::memcpy(static_cast<char*>(receive) + rank * bytes + start, group->area(rank), part);
    }
    TRY(barrier(group));
  }
  return HCCL_SUCCESS;
}

HcclResult HcclScatter(void* send, void* receive, uint64_t count, HcclDataType type, uint32_t root, HcclComm handle,
                       aclrtStream) {
  auto* group = group_of(handle);
  TRY(begin(group, "HcclScatter"));
  size_t bytes = count * width_of(type), most = AREA / group->size;
  for (size_t start = 0; start < bytes; start += most) {
    size_t part = std::min(most, bytes - start);
    for (uint32_t rank = 0; rank < group->size && group->rank == root; rank++) {
      std::memcpy(group->area(root) + rank * part, static_cast<char*>(send) + rank * bytes + start, part);
    }
    TRY(barrier(group));
    std::memcpy(static_cast<char*>(receive) + start, group->area(root) + group->rank * part, part);
    TRY(barrier(group));
  }
  return HCCL_SUCCESS;
}

// Each rank's area starts with a table: where the part for each rank begins, and how long it is.
HcclResult HcclAlltoAllV(const void* send, const void* send_counts, const void* send_starts, HcclDataType type,
                         const void* receive, const void* receive_counts, const void* receive_starts, HcclDataType,
                         HcclComm handle, aclrtStream) {
  auto* group = group_of(handle);
  TRY(begin(group, "HcclAlltoAllV"));
  auto counts = static_cast<const uint64_t*>(send_counts), starts = static_cast<const uint64_t*>(send_starts);
  auto wanted = static_cast<const uint64_t*>(receive_counts), places = static_cast<const uint64_t*>(receive_starts);
  size_t width = width_of(type), used = group->size * 2 * sizeof(uint64_t);
  auto* table = reinterpret_cast<uint64_t*>(group->area(group->rank));
  for (uint32_t rank = 0; rank < group->size; rank++) {
    size_t bytes = counts[rank] * width;
    if (used + bytes > AREA) return fail(0, "an all-to-all sends more than 32 MiB from one rank"), HCCL_E_NOT_SUPPORT;
    table[2 * rank] = used, table[2 * rank + 1] = bytes;
    std::memcpy(group->area(group->rank) + used, static_cast<const char*>(send) + starts[rank] * width, bytes);
    used += bytes;
  }
  TRY(barrier(group));
  HcclResult result = HCCL_SUCCESS;
  for (uint32_t rank = 0; rank < group->size; rank++) {
    auto* theirs = reinterpret_cast<uint64_t*>(group->area(rank)) + 2 * group->rank;
    char* place = static_cast<char*>(const_cast<void*>(receive)) + places[rank] * width;
    if (theirs[1] == wanted[rank] * width) {
      std::memcpy(place, group->area(rank) + theirs[0], theirs[1]);
      continue;
    }
    fail(0, "rank " + std::to_string(rank) + " sends " + std::to_string(theirs[1] / width) + " elements, rank " +
                std::to_string(group->rank) + " expects " + std::to_string(wanted[rank]));
    result = HCCL_E_PARA;
  }
  TRY(barrier(group));
  return result;
}

HcclResult HcclAlltoAll(const void* send, uint64_t count, HcclDataType type, const void* receive, uint64_t,
                        HcclDataType, HcclComm handle, aclrtStream stream) {
  std::vector<uint64_t> counts(group_of(handle)->size, count), starts(counts.size());
  for (size_t rank = 0; rank < starts.size(); rank++) starts[rank] = rank * count;
  return HcclAlltoAllV(send, counts.data(), starts.data(), type, receive, counts.data(), starts.data(), type, handle,
                       stream);
}

HcclResult HcclSend(void* data, uint64_t count, HcclDataType type, uint32_t to, HcclComm handle, aclrtStream) {
  TRY(begin(group_of(handle), "HcclSend"));
  return exchange(group_of(handle), {{true, static_cast<char*>(data), count * width_of(type), to}});
}

HcclResult HcclRecv(void* data, uint64_t count, HcclDataType type, uint32_t from, HcclComm handle, aclrtStream) {
  TRY(begin(group_of(handle), "HcclRecv"));
  return exchange(group_of(handle), {{false, static_cast<char*>(data), count * width_of(type), from}});
}

HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, HcclComm handle, aclrtStream) {
  TRY(begin(group_of(handle), "HcclBatchSendRecv"));
  std::vector<Message> messages;
  for (uint32_t i = 0; i < count; i++) {
    messages.push_back({items[i].sendRecvType == HCCL_SEND, static_cast<char*>(items[i].buf),
                        items[i].count * width_of(items[i].dataType), items[i].remoteRank});
  }
  return exchange(group_of(handle), std::move(messages));
}

}  // extern "C"

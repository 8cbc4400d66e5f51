// Collectives between processes of one machine through shared memory, behind the C interface of HCCL.
//
// Every pair of ranks has a mailbox for each direction. A collective is what each rank sends to and receives from each,
// itself included, exchanged side by side; a reduction then reduces what it received, in the order of ranks. A rank
// that ended, or does not come within FAKECANN_TIMEOUT_S, is an error for those that wait for it, and named there. On
// the real device a collective is asynchronous, here it is done on return.
#include "fakecann.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <acl/acl.h>
#include <fcntl.h>
#include <hccl/hccl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <map>
#include <random>

using namespace fakecann;

namespace {

constexpr uint32_t MOST_RANKS = 16;
constexpr size_t ROOM = size_t{1} << 20;

struct Mailbox {
  std::atomic<uint64_t> sent, taken;  // parts of messages; the box is free when they are equal
  uint64_t bytes;                     // of the message that are not taken yet, this part included
  char part[ROOM];
};

struct Shared {
  std::atomic<int> pids[MOST_RANKS];
  Mailbox mailboxes[];  // one for each (from, to)
};

struct Communicator {
  uint32_t size, rank;
  std::string name;
  long collectives = 0;
  Shared* shared = nullptr;

  size_t bytes() const { return sizeof(Shared) + size * size * sizeof(Mailbox); }
};

// Ends a collective; the C function returns the code.
[[noreturn]] void refuse(HcclResult code, const std::string& sentence) {
  fail(0, sentence);
  throw code;
}

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
void wait(Communicator* group, Ready ready, Absent absent) {
  auto start = std::chrono::steady_clock::now();
  for (long spins = 0; !ready(); spins++) {
    usleep(spins < 100 ? 20 : 200);
    if (spins % 64) continue;
    bool late = std::chrono::steady_clock::now() - start > std::chrono::seconds(settings().timeout_s);
    for (uint32_t rank = 0; rank < group->size; rank++) {
      int pid = group->shared->pids[rank];
      bool ended = pid && !alive(pid);
      if (!(ended || late) || !absent(rank) || ready()) continue;
      refuse(ended ? HCCL_E_REMOTE : HCCL_E_TIMEOUT,
             "rank " + std::to_string(rank) + (ended ? " has ended" : " did not arrive in time") + "; rank " +
                 std::to_string(group->rank) + " was waiting for it in a collective of " + group->name);
    }
  }
}

// One side of a message between this rank and `peer`; what is left of it is in `data` and `bytes`.
struct Message {
  bool sends;
  uint32_t peer;
  char* data;
  size_t bytes;
  bool done = false;
};

Message message(bool sends, uint32_t peer, const void* data, size_t bytes) {
  return {sends, peer, static_cast<char*>(const_cast<void*>(data)), bytes};
}

// Moves the next part of a message through its mailbox, if that is free (to send) or full (to receive).
bool advance(Communicator* group, Message& message) {
  uint32_t from = message.sends ? group->rank : message.peer, to = message.sends ? message.peer : group->rank;
  Mailbox& box = group->shared->mailboxes[from * group->size + to];
  if (message.done || (message.sends ? box.sent != box.taken : box.sent == box.taken)) return false;
  if (message.sends) box.bytes = message.bytes;
  if (box.bytes != message.bytes) {
    refuse(HCCL_E_PARA, "rank " + std::to_string(from) + " sends " + std::to_string(box.bytes) + " bytes, rank " +
                            std::to_string(to) + " expects " + std::to_string(message.bytes));
  }
  size_t part = std::min(ROOM, message.bytes);
  if (part) std::memcpy(message.sends ? box.part : message.data, message.sends ? message.data : box.part, part);
  (message.sends ? box.sent : box.taken)++;
  message.data += part, message.bytes -= part;
  message.done = message.bytes == 0;
  return true;
}

// All messages move side by side, part by part, so that a ring of ranks that all send first does not stand still.
void exchange(Communicator* group, std::vector<Message> messages) {
  auto open = [](const Message& message) { return !message.done; };
  while (std::any_of(messages.begin(), messages.end(), open)) {
    bool moved = false;
    auto ready = [&] {
      for (auto& message : messages) moved = advance(group, message) || moved;
      return moved;
    };
    auto absent = [&](uint32_t rank) {
      return std::any_of(messages.begin(), messages.end(), [&](auto& m) { return open(m) && m.peer == rank; });
    };
    wait(group, ready, absent);
  }
}

// What goes to or comes from each rank, as a function of the rank: the same bytes, the next of equal length, or those
// that tables of lengths and places say.
struct Part {
  const void* data;
  size_t bytes;
};
auto same(const void* data, size_t bytes) {
  return [=](uint32_t) { return Part{data, bytes}; };
}
auto slices(const void* data, size_t bytes) {
  return [=](uint32_t rank) { return Part{static_cast<const char*>(data) + rank * bytes, bytes}; };
}
auto listed(const void* data, const void* counts, const void* starts, size_t width) {
  auto table = [](const void* numbers, uint32_t rank) { return static_cast<const uint64_t*>(numbers)[rank]; };
  return [=](uint32_t rank) {
    return Part{static_cast<const char*>(data) + table(starts, rank) * width, table(counts, rank) * width};
  };
}

// Every rank sends to every rank.
template <typename Sent, typename Received>
void exchange_all(Communicator* group, Sent sent, Received received) {
  std::vector<Message> messages;
  for (uint32_t rank = 0; rank < group->size; rank++) {
    messages.push_back(message(true, rank, sent(rank).data, sent(rank).bytes));
    messages.push_back(message(false, rank, received(rank).data, received(rank).bytes));
  }
  exchange(group, std::move(messages));
}

// One rank sends to every rank.
template <typename Sent>
void distribute(Communicator* group, uint32_t root, Sent sent, void* receive, size_t bytes) {
  std::vector<Message> messages = {message(false, root, receive, bytes)};
  for (uint32_t rank = 0; rank < group->size && group->rank == root; rank++) {
    messages.push_back(message(true, rank, sent(rank).data, bytes));
  }
  exchange(group, std::move(messages));
}

void join(Communicator* group) {
  if (group->size > MOST_RANKS) {
    refuse(HCCL_E_NOT_SUPPORT, "a group of " + std::to_string(group->size) + " ranks; the emulator takes " +
                                   std::to_string(MOST_RANKS));
  }
  std::string path = "/dev/shm/fakecann_" + group->name;
  int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, static_cast<off_t>(group->bytes()))) refuse(HCCL_E_SYSCALL, "no room in " + path);
  void* data = mmap(nullptr, group->bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  close(file);
  if (data == MAP_FAILED) refuse(HCCL_E_MEMORY, "no room for " + path);
  group->shared = static_cast<Shared*>(data);
  group->shared->pids[group->rank] = getpid();
  exchange_all(group, same(nullptr, 0), same(nullptr, 0));  // until all have come
  if (group->rank == 0) unlink(path.c_str());
}

// Counts a collective, and carries out the fault that is due on this rank.
void begin(Communicator* group, const char* name) {
  trace(name);
  const Fault& due = fault();
  bool here = due.rank == static_cast<long>(group->rank) && ++group->collectives == due.count;
  if (here && due.kind == "exit") _exit(1);
  if (here && due.kind == "hang") sleep(static_cast<unsigned>(settings().timeout_s) * 10);
  if (pending_error(false)) throw HCCL_E_RUNTIME;
}

at::ScalarType type_of(HcclDataType type) {
  static const std::map<HcclDataType, at::ScalarType> types = {
      {HCCL_DATA_TYPE_INT8, at::kChar},  {HCCL_DATA_TYPE_INT16, at::kShort}, {HCCL_DATA_TYPE_INT32, at::kInt},
      {HCCL_DATA_TYPE_INT64, at::kLong}, {HCCL_DATA_TYPE_UINT8, at::kByte},  {HCCL_DATA_TYPE_FP16, at::kHalf},
      {HCCL_DATA_TYPE_FP32, at::kFloat}, {HCCL_DATA_TYPE_FP64, at::kDouble}, {HCCL_DATA_TYPE_BFP16, at::kBFloat16}};
  auto found = types.find(type);
  TORCH_CHECK(found != types.end(), "no collective takes the data type with number ", static_cast<int>(type));
  return found->second;
}

size_t bytes_of(uint64_t count, HcclDataType type) { return count * c10::elementSize(type_of(type)); }

// Reduces the `count` elements that come from each rank; who has no use for the result passes no `receive`.
template <typename Sent>
void reduce_all(Communicator* group, Sent sent, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  auto parts = at::empty({group->size, static_cast<int64_t>(count)}, type_of(type));
  exchange_all(group, sent, slices(parts.data_ptr(), bytes_of(count, type)));
  at::Tensor result = parts[0];
  for (uint32_t rank = 1; rank < group->size; rank++) {
    if (op == HCCL_REDUCE_SUM) result.add_(parts[rank]);
    if (op == HCCL_REDUCE_PROD) result.mul_(parts[rank]);
    if (op == HCCL_REDUCE_MAX) result.copy_(at::maximum(result, parts[rank]));
    if (op == HCCL_REDUCE_MIN) result.copy_(at::minimum(result, parts[rank]));
  }
  if (receive) std::memcpy(receive, result.data_ptr(), bytes_of(count, type));
}

std::vector<Message> messages_of(const HcclSendRecvItem* items, uint32_t count) {
  std::vector<Message> messages;
  for (auto* item = items; item < items + count; item++) {
    size_t bytes = bytes_of(item->count, item->dataType);
    messages.push_back(message(item->sendRecvType == HCCL_SEND, item->remoteRank, item->buf, bytes));
  }
  return messages;
}

Communicator* group_of(HcclComm handle) { return static_cast<Communicator*>(handle); }

template <typename Body>
HcclResult attempt(Body body) {
  try {
    body();
  } catch (HcclResult code) {
    return code;
  }
  return HCCL_SUCCESS;
}

HcclResult make_group(uint32_t size, uint32_t rank, const std::string& name, HcclComm* handle) {
  *handle = new Communicator{size, rank, name};
  return attempt([=] { join(group_of(*handle)); });
}

}  // namespace

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo* root) {
  std::random_device random;
  std::snprintf(root->internal, sizeof root->internal, "%d_%08x%08x", getpid(), random(), random());
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo* root, uint32_t rank, HcclComm* handle) {
  return make_group(size, rank, root->internal, handle);
}

HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo* root, uint32_t rank, const HcclCommConfig*,
                                      HcclComm* handle) {
  return make_group(size, rank, root->internal, handle);
}

HcclResult HcclCreateSubCommConfig(HcclComm* parent, uint32_t size, uint32_t*, uint64_t id, uint32_t rank,
                                   HcclCommConfig*, HcclComm* handle) {
  return make_group(size, rank, group_of(*parent)->name + "_" + std::to_string(id), handle);
}

HcclResult HcclCommDestroy(HcclComm handle) {
  munmap(group_of(handle)->shared, group_of(handle)->bytes());
  delete group_of(handle);
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm handle, char* name) {
  std::snprintf(name, COMM_NAME_MAX_LENGTH, "fakecann_%s", group_of(handle)->name.c_str());
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm, HcclResult* code) { return HcclResult(give(code, HCCL_SUCCESS)); }

// A collective: its arguments but for the group and the stream, which come last in all, and what it does.
#define UNPACK(...) __VA_ARGS__
#define COLLECTIVE(NAME, PARAMETERS, ...)                                    \
  HcclResult NAME(UNPACK PARAMETERS, HcclComm handle, aclrtStream) {         \
    auto* group = group_of(handle);                                          \
    return attempt([&] { begin(group, #NAME), __VA_ARGS__; });               \
  }
#define ELEMENTS uint64_t count, HcclDataType type
#define REDUCED ELEMENTS, HcclReduceOp op

COLLECTIVE(HcclAllReduce, (void* send, void* receive, REDUCED),
           reduce_all(group, same(send, bytes_of(count, type)), receive, count, type, op))
COLLECTIVE(HcclReduce, (void* send, void* receive, REDUCED, uint32_t root),
           reduce_all(group, same(send, bytes_of(count, type)), group->rank == root ? receive : nullptr, count, type,
                      op))
COLLECTIVE(HcclReduceScatter, (void* send, void* receive, REDUCED),
           reduce_all(group, slices(send, bytes_of(count, type)), receive, count, type, op))
COLLECTIVE(HcclAllGather, (void* send, void* receive, ELEMENTS),
           exchange_all(group, same(send, bytes_of(count, type)), slices(receive, bytes_of(count, type))))
COLLECTIVE(HcclAlltoAll, (const void* send, ELEMENTS, const void* receive, uint64_t, HcclDataType),
           exchange_all(group, slices(send, bytes_of(count, type)), slices(receive, bytes_of(count, type))))
COLLECTIVE(HcclAlltoAllV,
           (const void* send, const void* counts, const void* starts, HcclDataType type, const void* receive,
            const void* receive_counts, const void* receive_starts, HcclDataType),
           exchange_all(group, listed(send, counts, starts, bytes_of(1, type)),
                        listed(receive, receive_counts, receive_starts, bytes_of(1, type))))
COLLECTIVE(HcclBroadcast, (void* data, ELEMENTS, uint32_t root),
           distribute(group, root, same(data, bytes_of(count, type)), data, bytes_of(count, type)))
COLLECTIVE(HcclScatter, (void* send, void* receive, ELEMENTS, uint32_t root),
           distribute(group, root, slices(send, bytes_of(count, type)), receive, bytes_of(count, type)))
COLLECTIVE(HcclSend, (void* data, ELEMENTS, uint32_t to),
           exchange(group, {message(true, to, data, bytes_of(count, type))}))
COLLECTIVE(HcclRecv, (void* data, ELEMENTS, uint32_t from),
           exchange(group, {message(false, from, data, bytes_of(count, type))}))
COLLECTIVE(HcclBatchSendRecv, (HcclSendRecvItem* items, uint32_t count), exchange(group, messages_of(items, count)))

}  // extern "C"

ACCEPTED(HcclGetCommConfigCapability) ACCEPTED(HcclSetConfig)

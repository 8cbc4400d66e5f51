// Streams and events. An operator is done when its call returns, so a stream is never busy and an event is a time.
#include "fakecann.h"

#include <acl/acl.h>

#include <atomic>
#include <chrono>

using namespace fakecann;

namespace {

struct Stream {
  int32_t id;
};

struct Event {
  double recorded_us = 0;
};

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Event* event_of(aclrtEvent event) { return static_cast<Event*>(event); }

}  // namespace

extern "C" {

aclError aclrtCreateStream(aclrtStream* stream) {
  static std::atomic<int32_t> next{1};
  *stream = new Stream{next++};
  return ACL_SUCCESS;
}

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) { return aclrtCreateStream(stream); }

aclError aclrtDestroyStream(aclrtStream stream) {
  delete static_cast<Stream*>(stream);
  return ACL_SUCCESS;
}

aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }

aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
  *id = stream ? static_cast<Stream*>(stream)->id : 0;
  return ACL_SUCCESS;
}

aclError aclrtStreamQuery(aclrtStream, aclrtStreamStatus* status) {
  *status = ACL_STREAM_STATUS_COMPLETE;
  return pending_error(true);
}

aclError aclrtSynchronizeStream(aclrtStream) { return pending_error(true); }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream, int32_t) { return pending_error(true); }
aclError aclrtSynchronizeDevice() { return pending_error(true); }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return pending_error(true); }
aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return ACL_SUCCESS; }

aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* on) {
  *on = 0;
  return ACL_SUCCESS;
}

aclError aclrtCreateEvent(aclrtEvent* event) {
  *event = new Event;
  return ACL_SUCCESS;
}

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t) { return aclrtCreateEvent(event); }
aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) { return aclrtCreateEvent(event); }

aclError aclrtDestroyEvent(aclrtEvent event) {
  delete event_of(event);
  return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream) {
  event_of(event)->recorded_us = now_us();
  return pending_error(false);
}

aclError aclrtResetEvent(aclrtEvent, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtStreamWaitEvent(aclrtStream, aclrtEvent) { return pending_error(false); }
aclError aclrtSynchronizeEvent(aclrtEvent) { return pending_error(true); }

aclError aclrtQueryEventStatus(aclrtEvent, aclrtEventRecordedStatus* status) {
  *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
  return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus* status) {
  *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
  return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float* ms, aclrtEvent start, aclrtEvent end) {
  *ms = static_cast<float>((event_of(end)->recorded_us - event_of(start)->recorded_us) / 1e3);
  return ACL_SUCCESS;
}

aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t* us) {
  *us = static_cast<uint64_t>(event_of(event)->recorded_us);
  return ACL_SUCCESS;
}

}  // extern "C"

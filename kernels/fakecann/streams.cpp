// Streams and events. An operator is done when its call returns, so a stream is only a number, never busy, and an event
// is the time of its recording in microseconds.
#include "fakecann.h"

#include <acl/acl.h>

#include <atomic>
#include <chrono>

using namespace fakecann;

static double& time_of(aclrtEvent event) { return *static_cast<double*>(event); }

extern "C" {

aclError aclrtCreateStream(aclrtStream* stream) {
  static std::atomic<int32_t> next{1};
  return give(stream, new int32_t{next++});
}

aclError aclrtDestroyStream(aclrtStream stream) {
  delete static_cast<int32_t*>(stream);
  return ACL_SUCCESS;
}

aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
  return give(id, stream ? *static_cast<int32_t*>(stream) : 0);
}

aclError aclrtStreamQuery(aclrtStream, aclrtStreamStatus* status) {
  *status = ACL_STREAM_STATUS_COMPLETE;
  return pending_error(true);
}

aclError aclrtSynchronizeDevice() { return pending_error(true); }
aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* on) { return give(on, 0); }

aclError aclrtCreateEvent(aclrtEvent* event) { return give(event, new double{0}); }

aclError aclrtDestroyEvent(aclrtEvent event) {
  delete &time_of(event);
  return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream) {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  time_of(event) = std::chrono::duration<double, std::micro>(now).count();
  return pending_error(false);
}

aclError aclrtStreamWaitEvent(aclrtStream, aclrtEvent) { return pending_error(false); }

aclError aclrtQueryEventStatus(aclrtEvent, aclrtEventRecordedStatus* status) {
  return give(status, ACL_EVENT_RECORDED_STATUS_COMPLETE);
}

aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus* status) {
  return give(status, ACL_EVENT_WAIT_STATUS_COMPLETE);
}

aclError aclrtEventElapsedTime(float* ms, aclrtEvent start, aclrtEvent end) {
  return give(ms, static_cast<float>((time_of(end) - time_of(start)) / 1e3));
}

aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t* us) {
  return give(us, static_cast<uint64_t>(time_of(event)));
}

}  // extern "C"

// Whatever is waited for is done; priorities, flags, force and patience are not read.
SAME_AS(aclrtSynchronizeDevice, aclrtSynchronizeStream) SAME_AS(aclrtSynchronizeDevice, aclrtSynchronizeEvent)
SAME_AS(aclrtSynchronizeDevice, aclrtSynchronizeDeviceWithTimeout)
SAME_AS(aclrtSynchronizeDevice, aclrtSynchronizeStreamWithTimeout)
SAME_AS(aclrtCreateStream, aclrtCreateStreamWithConfig) SAME_AS(aclrtDestroyStream, aclrtDestroyStreamForce)
SAME_AS(aclrtCreateEvent, aclrtCreateEventWithFlag) SAME_AS(aclrtCreateEvent, aclrtCreateEventExWithFlag)
ACCEPTED(aclrtSetStreamFailureMode) ACCEPTED(aclrtSetStreamOverflowSwitch) ACCEPTED(aclrtResetEvent)

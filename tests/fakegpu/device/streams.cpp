// Streams, events and graphs. Work is done when it is enqueued; a capturing stream records it instead, and a graph does
// it at each launch. Calls that a capture forbids are refused and end the capture, as a driver does.

#include "device.h"

#include <algorithm>
#include <chrono>
#include <set>
#include <thread>

namespace fake {

using Work = std::vector<std::function<int()>>;

struct Stream;

struct Capture {
    std::shared_ptr<Work> work = std::make_shared<Work>();
    cudaStreamCaptureMode mode;
    std::thread::id thread;
    Stream* origin;
    bool invalid = false;
};

struct Stream {
    int device;
    unsigned flags;
    std::shared_ptr<Capture> capture;  // null if it does not capture
};

struct Event {
    std::shared_ptr<double> milliseconds = std::make_shared<double>(0);  // a graph may outlive the event
    std::shared_ptr<Capture> capture;  // the capture in which it was recorded
};

static std::set<Stream*> streams;
static std::set<std::shared_ptr<Capture>> captures;

static bool is_default(void* s) { return s == nullptr || s == cudaStreamLegacy || s == cudaStreamPerThread; }

static Stream* stream_of(void* s) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    return streams.count((Stream*)s) ? (Stream*)s : nullptr;
}

int device_of(void* s) {
    if (is_default(s)) return current_device();
    Stream* stream = stream_of(s);
    return stream ? stream->device : -1;
}

bool capturing() { return !captures.empty(); }

static int invalidate(Capture& c, int code, const char* what) {
    c.invalid = true;
    return refuse(code, "%s", what);
}

// Waits, allocations and loads are unsafe in a capture that is not relaxed: any thread's (global), or this thread's.
int may_not_wait(const char* what) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    for (const auto& c : captures) {
        const bool own = c->thread == std::this_thread::get_id();
        if (c->mode == cudaStreamCaptureModeGlobal || (c->mode == cudaStreamCaptureModeThreadLocal && own)) {
            return invalidate(*c, cudaErrorStreamCaptureUnsupported, what);
        }
    }
    return 0;
}

int enqueue(void* handle, const char* what, std::function<int()> work) {
    make_context();
    {
        std::lock_guard<std::recursive_mutex> guard(lock);
        if (is_default(handle)) {
            for (const auto& c : captures) {
                if (handle == cudaStreamPerThread || c->origin->flags & cudaStreamNonBlocking) continue;
                return invalidate(*c, cudaErrorStreamCaptureImplicit, what);
            }
        } else {
            Stream* stream = stream_of(handle);
            if (stream == nullptr) return refuse(cudaErrorInvalidResourceHandle, "%s: there is no such stream", what);
            if (Capture* c = stream->capture.get()) {
                if (c->invalid) return refuse(cudaErrorStreamCaptureInvalidated, "%s", what);
                c->work->push_back(std::move(work));
                return 0;
            }
        }
    }
    return work();
}

static cudaError_t create(cudaStream_t* made, unsigned flags) {
    if (int error = ready()) return (cudaError_t)error;
    std::lock_guard<std::recursive_mutex> guard(lock);
    Stream* stream = new Stream{current_device(), flags, nullptr};
    streams.insert(stream);
    *made = (cudaStream_t)stream;
    return cudaSuccess;
}

// A wait for one stream, or (null) for all streams of the device.
static cudaError_t wait(Stream* stream, const char* what) {
    count(SYNCHRONISATIONS);
    if (int error = may_not_wait(what)) return (cudaError_t)error;
    std::lock_guard<std::recursive_mutex> guard(lock);
    for (const auto& c : captures) {
        if (stream == nullptr || stream->capture == c) {
            return (cudaError_t)invalidate(*c, cudaErrorStreamCaptureUnsupported, what);
        }
    }
    return cudaSuccess;
}

static cudaError_t wait_for(cudaStream_t handle, const char* what) {
    if (is_default(handle)) {
        count(SYNCHRONISATIONS);
        if (int error = may_not_wait(what)) return (cudaError_t)error;
        return (cudaError_t)enqueue(handle, what, [] { return 0; });
    }
    Stream* stream = stream_of(handle);
    return stream ? wait(stream, what) : (cudaError_t)refuse(cudaErrorInvalidResourceHandle, "%s", what);
}

static cudaError_t wait_for(cudaEvent_t event, const char* what) {
    count(SYNCHRONISATIONS);
    std::lock_guard<std::recursive_mutex> guard(lock);
    const auto& c = ((Event*)event)->capture;
    if (c && captures.count(c)) return (cudaError_t)invalidate(*c, cudaErrorStreamCaptureUnsupported, what);
    return (cudaError_t)may_not_wait(what);
}

static cudaError_t create(cudaEvent_t* made) {
    if (int error = ready()) return (cudaError_t)error;
    return *made = (cudaEvent_t) new Event, cudaSuccess;
}

}  // namespace fake

using namespace fake;

extern "C" {

cudaError_t cudaStreamCreate(cudaStream_t* s) { return create(s, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) { return create(s, flags); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int) { return create(s, flags); }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return (cudaError_t)refuse(cudaErrorInvalidResourceHandle, "there is no such stream");
    if (const auto lost = stream->capture; lost && lost->origin == stream) {
        captures.erase(lost);
        for (Stream* s : streams) if (s->capture == lost) s->capture = nullptr;
    }
    streams.erase(stream);
    return delete stream, cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned* flags) {
    Stream* stream = stream_of(handle);
    return *flags = stream ? stream->flags : 0, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait_for(s, "cudaStreamSynchronize"); }
cudaError_t cudaStreamQuery(cudaStream_t s) { return wait_for(s, "cudaStreamQuery"); }
cudaError_t cudaDeviceSynchronize() {
    if (int error = ready()) return (cudaError_t)error;
    return wait(nullptr, "cudaDeviceSynchronize");
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    Stream* stream = stream_of(handle);
    if (stream == nullptr || stream->capture) {
        return (cudaError_t)refuse(cudaErrorStreamCaptureUnsupported, "the stream captures already, or is the default one");
    }
    auto capture = std::make_shared<Capture>();
    capture->mode = mode;
    capture->thread = std::this_thread::get_id();
    capture->origin = stream;
    stream->capture = capture;
    captures.insert(capture);
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    *graph = nullptr;
    Stream* stream = stream_of(handle);
    if (stream == nullptr || !stream->capture || stream->capture->origin != stream) {
        return (cudaError_t)refuse(cudaErrorStreamCaptureUnmatched, "cudaStreamEndCapture");
    }
    const auto capture = stream->capture;
    for (Stream* s : streams) if (s->capture == capture) s->capture = nullptr;
    captures.erase(capture);
    if (capture->invalid) return (cudaError_t)refuse(cudaErrorStreamCaptureInvalidated, "cudaStreamEndCapture");
    *graph = (cudaGraph_t) new std::shared_ptr<Work>(capture->work);
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    Stream* stream = stream_of(handle);
    const Capture* c = stream ? stream->capture.get() : nullptr;
    *status = !c ? cudaStreamCaptureStatusNone
        : c->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

// Graphs and executable graphs share the recorded work.
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
    *made = (cudaGraphExec_t) new std::shared_ptr<Work>(*(std::shared_ptr<Work>*)graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    const std::shared_ptr<Work> work = *(std::shared_ptr<Work>*)graph;
    return (cudaError_t)enqueue(stream, "a graph", [work] {
        for (const auto& each : *work) if (int error = each()) return error;
        return 0;
    });
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete (std::shared_ptr<Work>*)graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete (std::shared_ptr<Work>*)graph, cudaSuccess; }

cudaError_t cudaEventCreate(cudaEvent_t* e) { return create(e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return create(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete (Event*)e, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    Event* event = (Event*)handle;
    Stream* s = stream_of(stream);
    event->capture = s ? s->capture : nullptr;
    return (cudaError_t)enqueue(stream, "an event", [at = event->milliseconds] {
        const auto now = std::chrono::steady_clock::now().time_since_epoch();
        return *at = std::chrono::duration<double, std::milli>(now).count(), 0;
    });
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return wait_for(e, "cudaEventSynchronize"); }
cudaError_t cudaEventQuery(cudaEvent_t e) { return wait_for(e, "cudaEventQuery"); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = *((Event*)to)->milliseconds - *((Event*)from)->milliseconds;
    return cudaSuccess;
}
// A stream that waits for a captured event joins the capture.
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    const auto& c = ((Event*)event)->capture;
    Stream* stream = stream_of(handle);
    if (c && captures.count(c)) {
        if (stream == nullptr || (stream->capture && stream->capture != c)) {
            return (cudaError_t)invalidate(*c, cudaErrorStreamCaptureImplicit, "cudaStreamWaitEvent");
        }
        stream->capture = c;
    } else if (stream && stream->capture) {
        return (cudaError_t)invalidate(*stream->capture, cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent");
    }
    return cudaSuccess;
}

cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

}

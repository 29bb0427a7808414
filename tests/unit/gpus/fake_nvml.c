/* A libnvidia-ml.so.1 for tests: as much of NVML as pals_ray.gpus.nvml calls, on GPUs that live in a small file.
 *
 * The file is named by FAKE_NVML_STATE and laid out as struct state below (fake_nvml.py holds the same layout and
 * makes the file); every process that maps it sees the same GPUs, and limits outlive the process that set them, as
 * they do on real ones. Signatures and codes follow nvml.h of CUDA 13.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define SUCCESS 0
#define UNINITIALIZED 1
#define INVALID_ARGUMENT 2
#define NOT_SUPPORTED 3
#define NO_PERMISSION 4
#define NOT_FOUND 6
#define INSUFFICIENT_SIZE 7
#define DRIVER_NOT_LOADED 9
#define GPU_IS_LOST 15

#define FIELD_POWER_INSTANT 186
#define REASON_GPU_IDLE 0x1ull
#define REASON_SW_POWER_CAP 0x4ull
#define VALUE_TYPE_UNSIGNED_INT 1

#define MAX_GPUS 64
#define MAX_PIDS 8

struct gpu {
    char uuid[80], name[96];
    uint32_t min_mw, max_mw;         /* max_mw 0: a device without a power limit */
    uint32_t limit_mw;               /* in-band */
    uint32_t out_of_band_mw;         /* 0: none */
    uint32_t natural_mw;             /* what it would draw if nothing capped it */
    uint32_t idle_mw;
    uint32_t permission, lost, mig;  /* switches */
    uint32_t energy_counter, instant_field, average_usage;
    uint32_t num_pids, pids[MAX_PIDS];
    uint32_t set_calls;
    uint64_t energy_uj, energy_at_ns; /* the counter, and when it was brought up to date */
    uint32_t mw_before;              /* draw before the last order, for the 1 s average */
    uint32_t pad;
    uint64_t ordered_at_ns;
};

struct state {
    uint32_t num_gpus, delay_ms;
    struct gpu gpus[MAX_GPUS];
};

typedef struct gpu *device;
struct field_value {
    uint32_t field_id, scope_id;
    int64_t timestamp, latency_us;
    uint32_t value_type, nvml_return;
    union { double d; uint32_t ui; uint64_t ull; } value;
};
struct process_info {
    uint32_t pid;
    uint64_t used_memory;
    uint32_t gpu_instance, compute_instance;
};

static struct state *shared;
static int state_fd = -1, references;
static pthread_mutex_t threads = PTHREAD_MUTEX_INITIALIZER;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* A process that dies lets go of a flock, so a killed agent cannot wedge the others. */
static void lock(void) {
    pthread_mutex_lock(&threads);
    while (flock(state_fd, LOCK_EX) != 0 && errno == EINTR) {}
}

static void unlock(void) {
    flock(state_fd, LOCK_UN);
    pthread_mutex_unlock(&threads);
}

static int enter(void) {
    if (references == 0) return UNINITIALIZED;
    if (shared->delay_ms) {
        struct timespec t = {shared->delay_ms / 1000, (long)(shared->delay_ms % 1000) * 1000000l};
        while (nanosleep(&t, &t) != 0 && errno == EINTR) {}
    }
    return SUCCESS;
}

static int enter_gpu(device gpu) {
    int code = enter();
    if (code != SUCCESS) return code;
    return gpu->lost ? GPU_IS_LOST : SUCCESS;
}

static uint32_t enforced_mw(device gpu) {
    return gpu->out_of_band_mw && gpu->out_of_band_mw < gpu->limit_mw ? gpu->out_of_band_mw : gpu->limit_mw;
}

static uint32_t draw_mw(device gpu) {
    uint32_t cap = enforced_mw(gpu);
    uint32_t mw = gpu->max_mw && gpu->natural_mw > cap ? cap : gpu->natural_mw;
    return mw > gpu->idle_mw ? mw : gpu->idle_mw;
}

/* Under the lock. */
static void count_energy(device gpu, uint64_t now) {
    if (now > gpu->energy_at_ns) {
        gpu->energy_uj += (now - gpu->energy_at_ns) / 1000 * draw_mw(gpu) / 1000;
        gpu->energy_at_ns = now;
    }
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&threads);
    int code = SUCCESS;
    if (references == 0) {
        const char *path = getenv("FAKE_NVML_STATE");
        struct stat st;
        state_fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
        if (state_fd < 0 || fstat(state_fd, &st) != 0 || st.st_size != (off_t)sizeof(struct state)) {
            code = DRIVER_NOT_LOADED;
        } else {
            shared = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, state_fd, 0);
            if (shared == MAP_FAILED) code = DRIVER_NOT_LOADED;
        }
        if (code != SUCCESS && state_fd >= 0) close(state_fd);
    }
    if (code == SUCCESS) references++;
    pthread_mutex_unlock(&threads);
    return code;
}

int nvmlShutdown(void) {
    pthread_mutex_lock(&threads);
    int code = references > 0 ? SUCCESS : UNINITIALIZED;
    if (references > 0 && --references == 0) {
        munmap(shared, sizeof(struct state));
        close(state_fd);
    }
    pthread_mutex_unlock(&threads);
    return code;
}

const char *nvmlErrorString(int code) {
    (void)code;
    return "an error of the fake NVML";
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    int code = enter();
    if (code == SUCCESS) *count = shared->num_gpus;
    return code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *out) {
    int code = enter();
    if (code != SUCCESS) return code;
    if (index >= shared->num_gpus) return INVALID_ARGUMENT;
    *out = &shared->gpus[index];
    return (*out)->lost ? GPU_IS_LOST : SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, device *out) {
    int code = enter();
    if (code != SUCCESS) return code;
    for (unsigned i = 0; i < shared->num_gpus; i++)
        if (strcmp(shared->gpus[i].uuid, uuid) == 0) {
            *out = &shared->gpus[i];
            return (*out)->lost ? GPU_IS_LOST : SUCCESS;
        }
    return NOT_FOUND;
}

static int copy_text(const char *text, char *out, unsigned size) {
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}

int nvmlDeviceGetUUID(device gpu, char *out, unsigned size) {
    int code = enter_gpu(gpu);
    return code == SUCCESS ? copy_text(gpu->uuid, out, size) : code;
}

int nvmlDeviceGetName(device gpu, char *out, unsigned size) {
    int code = enter_gpu(gpu);
    return code == SUCCESS ? copy_text(gpu->name, out, size) : code;
}

int nvmlDeviceGetMigMode(device gpu, unsigned *current, unsigned *pending) {
    int code = enter_gpu(gpu);
    if (code == SUCCESS) *current = *pending = gpu->mig;
    return code;
}

int nvmlDeviceGetPowerManagementLimitConstraints(device gpu, unsigned *min_mw, unsigned *max_mw) {
    int code = enter_gpu(gpu);
    if (code != SUCCESS) return code;
    if (gpu->max_mw == 0) return NOT_SUPPORTED;
    *min_mw = gpu->min_mw;
    *max_mw = gpu->max_mw;
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(device gpu, unsigned *mw) {
    int code = enter_gpu(gpu);
    if (code != SUCCESS) return code;
    if (gpu->max_mw == 0) return NOT_SUPPORTED;
    *mw = enforced_mw(gpu);
    return SUCCESS;
}

int nvmlDeviceGetPowerManagementLimit(device gpu, unsigned *mw) {
    int code = enter_gpu(gpu);
    if (code != SUCCESS) return code;
    if (gpu->max_mw == 0) return NOT_SUPPORTED;
    *mw = gpu->limit_mw;
    return SUCCESS;
}

int nvmlDeviceSetPowerManagementLimit(device gpu, unsigned mw) {
    int code = enter_gpu(gpu);
    if (code != SUCCESS) return code;
    __atomic_add_fetch(&gpu->set_calls, 1, __ATOMIC_SEQ_CST);
    if (gpu->max_mw == 0) return NOT_SUPPORTED;
    if (!gpu->permission) return NO_PERMISSION;
    if (mw < gpu->min_mw || mw > gpu->max_mw) return INVALID_ARGUMENT;
    lock();
    uint64_t now = now_ns();
    count_energy(gpu, now);
    gpu->mw_before = draw_mw(gpu);
    gpu->ordered_at_ns = now;
    gpu->limit_mw = mw;
    unlock();
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(device gpu, unsigned *mw) {
    int code = enter_gpu(gpu);
    if (code != SUCCESS) return code;
    uint64_t since = now_ns() - gpu->ordered_at_ns, second = 1000000000ull;
    if (gpu->average_usage && since < second)
        *mw = (unsigned)((gpu->mw_before * (second - since) + draw_mw(gpu) * since) / second);
    else
        *mw = draw_mw(gpu);
    return SUCCESS;
}

int nvmlDeviceGetFieldValues(device gpu, int count, struct field_value *values) {
    int code = enter_gpu(gpu);
    if (code != SUCCESS) return code;
    for (int i = 0; i < count; i++) {
        if (values[i].field_id != FIELD_POWER_INSTANT || !gpu->instant_field) {
            values[i].nvml_return = values[i].field_id == FIELD_POWER_INSTANT ? NOT_SUPPORTED : INVALID_ARGUMENT;
            continue;
        }
        values[i].value_type = VALUE_TYPE_UNSIGNED_INT;
        values[i].value.ui = draw_mw(gpu);
        values[i].nvml_return = SUCCESS;
    }
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(device gpu, unsigned long long *mj) {
    int code = enter_gpu(gpu);
    if (code != SUCCESS) return code;
    if (!gpu->energy_counter) return NOT_SUPPORTED;
    lock();
    count_energy(gpu, now_ns());
    *mj = gpu->energy_uj / 1000;
    unlock();
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(device gpu, unsigned long long *reasons) {
    int code = enter_gpu(gpu);
    if (code != SUCCESS) return code;
    if (gpu->max_mw && gpu->natural_mw > enforced_mw(gpu)) *reasons = REASON_SW_POWER_CAP;
    else *reasons = gpu->natural_mw <= gpu->idle_mw ? REASON_GPU_IDLE : 0;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device gpu, unsigned *count, struct process_info *out) {
    int code = enter_gpu(gpu);
    if (code != SUCCESS) return code;
    unsigned room = *count;
    *count = gpu->num_pids;
    if (gpu->num_pids == 0) return SUCCESS;
    if (room < gpu->num_pids || out == NULL) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < gpu->num_pids; i++)
        out[i] = (struct process_info){gpu->pids[i], 1u << 30, 0xffffffffu, 0xffffffffu};
    return SUCCESS;
}

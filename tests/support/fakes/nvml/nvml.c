/* A stand-in libnvidia-ml.so.1: what NVML would say of the GPUs in a world file.
 *
 * The file is named in SMARTPROXY_FAKE_NVML (format: ../world.py) and read again on every call.
 * Like the real one: the list of GPUs is taken at nvmlInit, a lost GPU answers GPU_IS_LOST until
 * NVML is initialised again, MIG slices answer few questions, and a too small array gives
 * INSUFFICIENT_SIZE. Exported are the symbols that nvidia-ml-py asks for.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15
};
enum { MAX_GPUS = 64, MAX_PROCESSES = 512, MAX_FAULTS = 64, TEXT = 96 };

typedef unsigned long long u64;
typedef struct { char uuid[TEXT]; } Device;

typedef struct {
    char uuid[TEXT], name[TEXT], pci[32], parent[TEXT];
    u64 total, used, reserved;
    unsigned utilization, temperature, power_mw, major, minor;
    int lost, mig;
} Gpu;

typedef struct { char uuid[TEXT], kind[16]; unsigned pid; u64 bytes; } Process;
typedef struct { char function[TEXT], uuid[TEXT]; int code; double seconds; } Fault;

typedef struct {
    char version[TEXT];
    int init, gpus, processes, faults;
    Gpu gpu[MAX_GPUS];
    Process process[MAX_PROCESSES];
    Fault fault[MAX_FAULTS];
} World;

/* the session: what nvmlInit saw; handles point into `device` */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int initialised, devices, migs;
static Device device[MAX_GPUS], mig_device[MAX_GPUS];
static int seen_lost[MAX_GPUS];

/* --- the world ------------------------------------------------------------------------------ */

static void field(const char *line, const char *key, char *out, size_t size) {
    char mark[32];
    snprintf(mark, sizeof mark, "\t%s=", key);
    const char *at = strstr(line, mark);
    out[0] = 0;
    if (!at) return;
    at += strlen(mark);
    size_t length = strcspn(at, "\t\n");
    if (length >= size) length = size - 1;
    memcpy(out, at, length);
    out[length] = 0;
}

static double number(const char *line, const char *key) {
    char text[TEXT];
    field(line, key, text, sizeof text);
    return atof(text);
}

static u64 bytes(const char *line, const char *key) {
    char text[TEXT];
    field(line, key, text, sizeof text);
    return text[0] == '-' ? ~0ULL : strtoull(text, NULL, 10);
}

static void read_gpu(const char *line, Gpu *gpu) {
    char text[TEXT];
    field(line, "uuid", gpu->uuid, TEXT);
    field(line, "name", gpu->name, TEXT);
    field(line, "pci", gpu->pci, sizeof gpu->pci);
    field(line, "parent", gpu->parent, TEXT);
    gpu->total = bytes(line, "total");
    gpu->used = bytes(line, "used");
    gpu->reserved = bytes(line, "reserved");
    gpu->utilization = (unsigned)number(line, "utilization");
    gpu->temperature = (unsigned)number(line, "temperature");
    gpu->power_mw = (unsigned)number(line, "power_mw");
    gpu->lost = (int)number(line, "lost");
    gpu->mig = (int)number(line, "mig");
    field(line, "capability", text, sizeof text);
    sscanf(text, "%u.%u", &gpu->major, &gpu->minor);
}

static void read_line(const char *line, World *world) {
    if (!strncmp(line, "driver\t", 7)) {
        field(line, "version", world->version, TEXT);
        world->init = (int)number(line, "init");
    } else if (!strncmp(line, "gpu\t", 4) || !strncmp(line, "mig\t", 4)) {
        if (world->gpus < MAX_GPUS) read_gpu(line, &world->gpu[world->gpus++]);
    } else if (!strncmp(line, "process\t", 8) && world->processes < MAX_PROCESSES) {
        Process *process = &world->process[world->processes++];
        field(line, "uuid", process->uuid, TEXT);
        field(line, "kind", process->kind, sizeof process->kind);
        process->pid = (unsigned)number(line, "pid");
        process->bytes = bytes(line, "bytes");
    } else if (!strncmp(line, "fault\t", 6) && world->faults < MAX_FAULTS) {
        Fault *fault = &world->fault[world->faults++];
        field(line, "function", fault->function, TEXT);
        field(line, "uuid", fault->uuid, TEXT);
        fault->code = (int)number(line, "code");
        fault->seconds = number(line, "seconds");
    }
}

static Gpu *find(World *world, const char *uuid) {
    for (int i = 0; i < world->gpus; i++)
        if (!strcmp(world->gpu[i].uuid, uuid)) return &world->gpu[i];
    return NULL;
}

/* --- what stand-in servers hold (FILE.held/PID-START) ----------------------------------------- */

static int alive(const char *entry) {
    char path[64], text[1024];
    unsigned pid;
    u64 start, found = 0;
    char state = 0;
    if (sscanf(entry, "%u-%llu", &pid, &start) != 2) return 0;
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    int file = open(path, O_RDONLY);
    if (file < 0) return 0;
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length <= 0) return 0;
    text[length] = 0;
    char *rest = strrchr(text, ')');
    if (!rest) return 0;
    sscanf(rest + 2, "%c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
           &state, &found);
    return found == start && state != 'Z' && state != 'X';
}

/* A dead server's memory stays for `lag` seconds from when somebody first saw it dead. */
static int lags(const char *path, double lag) {
    char mark[1100];
    struct stat seen;
    struct timespec now;
    if (lag <= 0) return 0;
    snprintf(mark, sizeof mark, "%s.dead", path);
    close(open(mark, O_CREAT | O_WRONLY, 0600));
    if (stat(mark, &seen)) return 0;
    clock_gettime(CLOCK_REALTIME, &now);
    double age = (double)(now.tv_sec - seen.st_mtim.tv_sec) +
                 (double)(now.tv_nsec - seen.st_mtim.tv_nsec) / 1e9;
    return age < lag;
}

static void read_held(const char *folder, const char *entry, World *world) {
    char path[1024], line[256], uuid[TEXT];
    u64 used;
    double lag = 0;
    snprintf(path, sizeof path, "%s/%s", folder, entry);
    FILE *file = fopen(path, "r");
    if (!file) return;
    if (fgets(line, sizeof line, file)) sscanf(line, "lag\t%lf", &lag);
    int lives = alive(entry), counts = lives || lags(path, lag);
    while (counts && fgets(line, sizeof line, file)) {
        if (sscanf(line, "%95[^\t]\t%llu", uuid, &used) != 2) continue;
        Gpu *gpu = find(world, uuid);
        if (!gpu || !used) continue;
        gpu->used += used;
        if (!lives || world->processes >= MAX_PROCESSES) continue;
        Process *process = &world->process[world->processes++];
        strcpy(process->uuid, uuid);
        strcpy(process->kind, "compute");
        process->pid = (unsigned)atoi(entry);
        process->bytes = used;
    }
    fclose(file);
}

static World *read_world(void) {
    char line[1024], folder[400];
    const char *path = getenv("SMARTPROXY_FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return NULL;
    World *world = calloc(1, sizeof *world);
    while (fgets(line, sizeof line, file)) read_line(line, world);
    fclose(file);
    for (int i = 0; i < world->processes; i++) {
        Gpu *gpu = find(world, world->process[i].uuid);
        if (gpu && world->process[i].bytes != ~0ULL) gpu->used += world->process[i].bytes;
    }
    /* after the sum above: read_held adds to both lists by itself */
    snprintf(folder, sizeof folder, "%s.held", path);
    DIR *directory = opendir(folder);
    struct dirent *entry;
    while (directory && (entry = readdir(directory)))
        if (entry->d_name[0] >= '0' && entry->d_name[0] <= '9' && !strchr(entry->d_name, '.'))
            read_held(folder, entry->d_name, world);
    if (directory) closedir(directory);
    return world;
}

/* --- every call ------------------------------------------------------------------------------- */

static int slot_of(const Device *handle) {
    return handle >= device && handle < device + devices ? (int)(handle - device) : -1;
}

/* Wait and fail as the world's faults say; `uuid` is "" for calls without a GPU. */
static int faulty(World *world, const char *function, const char *uuid) {
    for (int i = 0; i < world->faults; i++) {
        Fault *fault = &world->fault[i];
        if (strcmp(fault->function, function)) continue;
        if (fault->uuid[0] && strcmp(fault->uuid, uuid)) continue;
        if (fault->seconds > 0) {
            struct timespec wait = {(time_t)fault->seconds,
                                    (long)((fault->seconds - (time_t)fault->seconds) * 1e9)};
            while (nanosleep(&wait, &wait) && errno == EINTR) {}
        }
        if (fault->code) return fault->code;
    }
    return OK;
}

/* Begin a call on one GPU: its present state in *gpu, the world in *world for the caller to free. */
static int begin(const char *function, const Device *handle, World **world, Gpu **gpu) {
    *world = NULL;
    if (!initialised) return UNINITIALIZED;
    if (!handle) return INVALID_ARGUMENT;
    if (!(*world = read_world())) return DRIVER_NOT_LOADED;
    *gpu = find(*world, handle->uuid);
    int slot = slot_of(handle), result;
    if (slot >= 0 && (!*gpu || (*gpu)->lost)) seen_lost[slot] = 1;
    if (!*gpu || (slot >= 0 && seen_lost[slot]))
        result = GPU_IS_LOST;
    else
        result = faulty(*world, function, handle->uuid);
    if (result) {
        free(*world);
        *world = NULL;
    }
    return result;
}

#define ON_GPU(handle)                                              \
    World *world;                                                   \
    Gpu *gpu;                                                       \
    int result = begin(__func__, (handle), &world, &gpu);           \
    if (result) return result;

static int end(World *world, int result) {
    free(world);
    return result;
}

static int copy(char *out, unsigned size, const char *text) {
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return OK;
}

/* --- session ---------------------------------------------------------------------------------- */

/* "+" for every nvmlInit that worked, "-" for every nvmlShutdown, in the file WORLD.sessions */
static void note(const char *sign) {
    const char *path = getenv("SMARTPROXY_FAKE_NVML");
    if (!path) return;
    char name[4096];
    snprintf(name, sizeof name, "%s.sessions", path);
    int file = open(name, O_WRONLY | O_APPEND | O_CREAT, 0600);
    if (file < 0) return;
    if (write(file, sign, 1) != 1) perror(name);
    close(file);
}

static int init(const char *function) {
    World *world = read_world();
    if (!world) return DRIVER_NOT_LOADED;
    int result = faulty(world, function, "");
    if (!result) result = world->init;
    pthread_mutex_lock(&lock);
    if (!result && initialised++ == 0) {
        devices = migs = 0;
        memset(seen_lost, 0, sizeof seen_lost);
        for (int i = 0; i < world->gpus; i++)
            if (!world->gpu[i].parent[0]) strcpy(device[devices++].uuid, world->gpu[i].uuid);
    }
    if (!result) note("+");
    pthread_mutex_unlock(&lock);
    return end(world, result);
}

int nvmlInit_v2(void) { return init(__func__); }

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    return init(__func__);
}

int nvmlShutdown(void) {
    pthread_mutex_lock(&lock);
    int result = initialised ? OK : UNINITIALIZED;
    if (initialised) {
        initialised--;
        note("-");
    }
    pthread_mutex_unlock(&lock);
    return result;
}

const char *nvmlErrorString(int code) {
    switch (code) {
        case 1: return "Uninitialized";
        case 2: return "Invalid Argument";
        case 3: return "Not Supported";
        case 4: return "Insufficient Permissions";
        case 6: return "Not Found";
        case 9: return "Driver Not Loaded";
        case 10: return "Timeout";
        case 12: return "NVML Shared Library Not Found";
        case 15: return "GPU is lost";
        case 18: return "Driver/library version mismatch";
        default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    if (!initialised) return UNINITIALIZED;
    World *world = read_world();
    if (!world) return DRIVER_NOT_LOADED;
    int result = faulty(world, __func__, "");
    return end(world, result ? result : copy(version, length, world->version));
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    if (!initialised) return UNINITIALIZED;
    World *world = read_world();
    if (!world) return DRIVER_NOT_LOADED;
    *count = (unsigned)devices;
    return end(world, faulty(world, __func__, ""));
}

int nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length) {
    char path[64], text[512] = "";
    if (!initialised) return UNINITIALIZED;
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    int file = open(path, O_RDONLY);
    if (file < 0) return NOT_FOUND;
    ssize_t got = read(file, text, sizeof text - 1);
    close(file);
    return got <= 0 ? NOT_FOUND : copy(name, length, text);
}

/* --- one GPU ---------------------------------------------------------------------------------- */

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **handle) {
    if (!initialised) return UNINITIALIZED;
    if (index >= (unsigned)devices) return INVALID_ARGUMENT;
    *handle = &device[index];
    ON_GPU(*handle)
    return end(world, OK);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **handle) {
    if (!initialised) return UNINITIALIZED;
    for (int i = 0; i < devices; i++) {
        if (strcmp(device[i].uuid, uuid)) continue;
        *handle = &device[i];
        ON_GPU(*handle)
        return end(world, OK);
    }
    return NOT_FOUND;
}

int nvmlDeviceGetName(Device *handle, char *name, unsigned length) {
    ON_GPU(handle)
    return end(world, copy(name, length, gpu->name));
}

int nvmlDeviceGetUUID(Device *handle, char *uuid, unsigned length) {
    ON_GPU(handle)
    return end(world, copy(uuid, length, gpu->uuid));
}

int nvmlDeviceGetIndex(Device *handle, unsigned *index) {
    ON_GPU(handle)
    int slot = slot_of(handle);
    *index = (unsigned)slot;
    return end(world, slot < 0 ? NOT_SUPPORTED : OK);
}

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} PciInfo;

int nvmlDeviceGetPciInfo_v3(Device *handle, PciInfo *info) {
    ON_GPU(handle)
    memset(info, 0, sizeof *info);
    sscanf(gpu->pci, "%x:%x:%x", &info->domain, &info->bus, &info->device);
    snprintf(info->bus_id, sizeof info->bus_id, "%s", gpu->pci);
    return end(world, OK);
}

typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned version; u64 total, reserved, free, used; } Memory_v2;

static u64 free_of(const Gpu *gpu) {
    u64 taken = gpu->used + gpu->reserved;
    return taken > gpu->total ? 0 : gpu->total - taken;
}

int nvmlDeviceGetMemoryInfo(Device *handle, Memory *memory) {
    ON_GPU(handle)
    memory->total = gpu->total;
    memory->free = free_of(gpu);
    memory->used = gpu->total - memory->free;
    return end(world, OK);
}

int nvmlDeviceGetMemoryInfo_v2(Device *handle, Memory_v2 *memory) {
    if (memory->version != (sizeof *memory | 2u << 24)) return 25; /* version mismatch */
    ON_GPU(handle)
    memory->total = gpu->total;
    memory->reserved = gpu->reserved;
    memory->free = free_of(gpu);
    memory->used = gpu->total - gpu->reserved - memory->free;
    return end(world, OK);
}

int nvmlDeviceGetUtilizationRates(Device *handle, unsigned rates[2]) {
    ON_GPU(handle)
    rates[0] = rates[1] = gpu->utilization;
    return end(world, gpu->parent[0] ? NOT_SUPPORTED : OK);
}

int nvmlDeviceGetTemperature(Device *handle, int sensor, unsigned *temperature) {
    (void)sensor;
    ON_GPU(handle)
    *temperature = gpu->temperature;
    return end(world, gpu->parent[0] ? NOT_SUPPORTED : OK);
}

int nvmlDeviceGetPowerUsage(Device *handle, unsigned *milliwatts) {
    ON_GPU(handle)
    *milliwatts = gpu->power_mw;
    return end(world, gpu->parent[0] ? NOT_SUPPORTED : OK);
}

int nvmlDeviceGetCudaComputeCapability(Device *handle, int *major, int *minor) {
    ON_GPU(handle)
    *major = (int)gpu->major;
    *minor = (int)gpu->minor;
    return end(world, OK);
}

/* --- processes -------------------------------------------------------------------------------- */

typedef struct { unsigned pid; u64 bytes; unsigned instance, compute_instance; } ProcessInfo;

static int list(World *world, const Gpu *gpu, const char *kind, unsigned *count,
                ProcessInfo *out) {
    unsigned room = *count, found = 0;
    for (int i = 0; i < world->processes; i++) {
        const Process *process = &world->process[i];
        if (strcmp(process->uuid, gpu->uuid) || strcmp(process->kind, kind)) continue;
        if (out && found < room)
            out[found] = (ProcessInfo){process->pid, process->bytes, ~0u, ~0u};
        found++;
    }
    *count = found;
    return found > room || (!out && found) ? INSUFFICIENT_SIZE : OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *handle, unsigned *count, ProcessInfo *out) {
    ON_GPU(handle)
    return end(world, list(world, gpu, "compute", count, out));
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(Device *handle, unsigned *count, ProcessInfo *out) {
    ON_GPU(handle)
    return end(world, list(world, gpu, "graphics", count, out));
}

/* --- MIG -------------------------------------------------------------------------------------- */

int nvmlDeviceGetMigMode(Device *handle, unsigned *current, unsigned *pending) {
    ON_GPU(handle)
    *current = *pending = (unsigned)gpu->mig;
    /* cards that can't say so: anything that is not an A or H class data-centre card */
    int can = gpu->mig || strstr(gpu->name, "H100") || strstr(gpu->name, "A100");
    return end(world, can ? OK : NOT_SUPPORTED);
}

int nvmlDeviceGetMaxMigDeviceCount(Device *handle, unsigned *count) {
    ON_GPU(handle)
    *count = gpu->mig ? 7 : 0;
    return end(world, OK);
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *handle, unsigned index, Device **mig) {
    ON_GPU(handle)
    unsigned found = 0;
    for (int i = 0; i < world->gpus; i++) {
        if (strcmp(world->gpu[i].parent, gpu->uuid) || found++ != index) continue;
        pthread_mutex_lock(&lock);
        int slot = 0;
        while (slot < migs && strcmp(mig_device[slot].uuid, world->gpu[i].uuid)) slot++;
        if (slot == migs && migs < MAX_GPUS) strcpy(mig_device[migs++].uuid, world->gpu[i].uuid);
        pthread_mutex_unlock(&lock);
        *mig = &mig_device[slot];
        return end(world, OK);
    }
    return end(world, NOT_FOUND);
}

/* A libnvidia-ml.so.1 that tells of cards that are not there, by the environment: NVML_CARDS is their names with commas
   between, and the file NVML_STATE holds clock, temperature, throttle reasons, then a process id and its use of the
   card in percent for each process on it. A use of -1 stands for a driver that does not tell. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned pid; unsigned long long memory; unsigned instance, compute; } Process;
typedef struct { unsigned pid; unsigned long long time; unsigned sm, memory, encoder, decoder; } Sample;
enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7 };

static char names[8][96];
static unsigned long long now = 1000;
static struct { unsigned clock, celsius, count, pid[16]; unsigned long long reasons; int use[16]; } state;

static void look(void) {
    FILE *file = fopen(getenv("NVML_STATE"), "r");
    state.count = 0;
    if (!file) return;
    if (fscanf(file, "%u %u %llu", &state.clock, &state.celsius, &state.reasons) == 3)
        while (state.count < 16 && fscanf(file, "%u %d", &state.pid[state.count], &state.use[state.count]) == 2)
            state.count++;
    fclose(file);
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; return OK; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    char all[800];
    snprintf(all, sizeof all, "%s", getenv("NVML_CARDS"));
    *count = 0;
    for (char *name = strtok(all, ","); name && *count < 8; name = strtok(NULL, ","))
        snprintf(names[(*count)++], 96, "%s", name);
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned place, void **card) { *card = names[place]; return OK; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **card) {
    *card = names[0];
    return strcmp(uuid, "GPU-there") ? NOT_FOUND : OK;
}
int nvmlDeviceGetName(void *card, char *name, unsigned size) { snprintf(name, size, "%s", (char *)card); return OK; }
int nvmlDeviceGetClockInfo(void *card, int type, unsigned *value) {
    (void)card; (void)type; look(); *value = state.clock; return OK;
}
int nvmlDeviceGetTemperature(void *card, int sensor, unsigned *value) {
    (void)card; (void)sensor; look(); *value = state.celsius; return OK;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *card, unsigned long long *value) {
    (void)card; look(); *value = state.reasons; return OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *card, unsigned *count, Process *found) {
    (void)card; look();
    if (!state.count) { *count = 0; return OK; }
    if (*count < state.count) { *count = state.count; return TOO_SMALL; }
    *count = state.count;
    for (unsigned i = 0; i < state.count; i++) found[i] = (Process){.pid = state.pid[i]};
    return OK;
}

int nvmlDeviceGetProcessUtilization(void *card, Sample *found, unsigned *count, unsigned long long since) {
    (void)card; look();
    if (since > now) return NOT_SUPPORTED;
    if (!state.count) return NOT_FOUND;
    if (state.use[0] < 0) return NOT_SUPPORTED;
    if (!found) { *count = state.count; return TOO_SMALL; }
    for (unsigned i = 0; i < state.count; i++)
        found[i] = (Sample){.pid = state.pid[i], .time = ++now, .sm = (unsigned)state.use[i]};
    return OK;
}

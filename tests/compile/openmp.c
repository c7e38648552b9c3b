/* OpenMP's threads, and what >>backends says to do about them. `openmp fork`: a child is forked behind a
 * loop, and works alone. `openmp PLUGIN`: a library is opened that computes alone, closed, and opened again. The plugin is
 * this file with PLUGIN defined. */
#include <dlfcn.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dsv3.h"
#include "synthetic.h"

#define ROWS 48

/* A pass in this process: a sum over its logits. */
static double pass(dsv3_context *context) {
    static int32_t token[ROWS];
    static float logits[ROWS * 256];
    synth *s = synth_open_named(SYNTH_BLOCKS, 3);
    double sum = 0;
    s->context = *context;
    synth_run(s, ROWS, context->threads, 1, ROWS, DSV3_F32);
    synth_demand(synth_forward(s, logits, token, ROWS, 0, NULL), "forward", NULL);
    for (size_t i = 0; i < ROWS * (size_t)s->config.vocab_size; i++) sum += (double)logits[i];
    synth_close(s);
    return sum;
}

static void alone(dsv3_context *context) {
    context->parallel_for = NULL;
    context->threads = 1;
}

static void begin(dsv3_context *context) {
    synth_demand(dsv3_context_init(context, DSV3_BACKEND_REFERENCE, 2, NULL), "context", NULL);
}

#ifdef PLUGIN
double plugin(void);
double plugin(void) {
    dsv3_context context;
    begin(&context);
    alone(&context);
    return pass(&context);
}
#else
static int forked(void) {
    dsv3_context context;
    double sum;
    pid_t child;
    int status = 0;
    begin(&context);
    if (context.threads != 2) return 0; /* no OpenMP */
    sum = pass(&context);
    child = fork();
    if (child == 0) {
        alarm(60);
        alone(&context);
        _exit(pass(&context) <= sum && pass(&context) >= sum ? 0 : 1);
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static int opened(const char *path) {
    double sum[2];
    for (int i = 0; i < 2; i++) {
        void *library = dlopen(path, RTLD_NOW), *symbol = library != NULL ? dlsym(library, "plugin") : NULL;
        double (*call)(void);
        if (symbol == NULL) return 0;
        memcpy(&call, &symbol, sizeof call);
        sum[i] = call();
        dlclose(library);
        usleep(20000);
    }
    return sum[0] <= sum[1] && sum[0] >= sum[1];
}

int main(int argc, char **argv) {
    int good = argc > 1 && (strcmp(argv[1], "fork") == 0 ? forked() : opened(argv[1]));
    puts(good ? "ok" : "failed");
    return !good;
}
#endif

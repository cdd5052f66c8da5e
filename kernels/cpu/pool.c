/* A small pool of threads that sleep while there is nothing to do, for processes without OpenMP. */
#include "parallel.h"
#include <pthread.h>

enum { MOST = 256 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;     /* guards what follows */
static pthread_mutex_t one_call = PTHREAD_MUTEX_INITIALIZER; /* one caller has the pool at a time */
static pthread_cond_t begun = PTHREAD_COND_INITIALIZER, ended = PTHREAD_COND_INITIALIZER;
static unsigned workers, wanted, running;
static unsigned long round;
static void (*body_now)(void *);
static void *data_now;

static void *worker(void *argument)
{
    unsigned number = (unsigned)(uintptr_t)argument;
    unsigned long seen = 0;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (round == seen)
            pthread_cond_wait(&begun, &lock);
        seen = round;
        if (number >= wanted)
            continue;
        pthread_mutex_unlock(&lock);
        body_now(data_now);
        pthread_mutex_lock(&lock);
        if (--running == 0)
            pthread_cond_signal(&ended);
    }
    return NULL;
}

/* The child of a fork has none of its parent's threads. */
static void forget(void)
{
    workers = 0;
    pthread_mutex_init(&lock, NULL);
    pthread_mutex_init(&one_call, NULL);
    pthread_cond_init(&begun, NULL);
    pthread_cond_init(&ended, NULL);
}

static void grow(unsigned count) /* with `lock` held */
{
    static int watching;
    if (!watching)
        watching = !pthread_atfork(NULL, NULL, forget);
    while (workers < count && workers < MOST) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(uintptr_t)workers))
            return;
        pthread_detach(thread);
        workers++;
    }
}

void pool_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags)
{
    (void)flags;
    if (pthread_mutex_trylock(&one_call)) { /* another thread has the workers; the caller can do it alone */
        body(data);
        return;
    }
    pthread_mutex_lock(&lock);
    grow(threads - 1);
    wanted = running = threads - 1 < workers ? threads - 1 : workers;
    body_now = body;
    data_now = data;
    round++;
    pthread_cond_broadcast(&begun);
    pthread_mutex_unlock(&lock);
    body(data);
    pthread_mutex_lock(&lock);
    while (running)
        pthread_cond_wait(&ended, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&one_call);
}

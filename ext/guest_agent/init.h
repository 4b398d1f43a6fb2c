#ifndef HM_INIT_H
#define HM_INIT_H

/* Process 1: from the initramfs to the running agent. Never returns. */
_Noreturn void init_run(void);

#endif

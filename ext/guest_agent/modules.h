#ifndef HM_MODULES_H
#define HM_MODULES_H

void load_modules(void);

#endif

/* Two files of one program: this one holds the implementation ... */
#define CHAOS_IMPLEMENTATION
#include "chaos.h"

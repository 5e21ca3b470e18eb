// What running anything at all costs.
int main(void) { return 0; }

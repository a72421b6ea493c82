import { defineConfig } from "vite";

// Four files with names that stay, next to which fleet.json is written. Nothing is inlined: the page's policy forbids it.
export default defineConfig({
  base: "./",
  build: {
    outDir: "../roles/monitoring/files/page",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0,
    modulePreload: false,
    rollupOptions: {
      output: {
        entryFileNames: "page.js",
        assetFileNames: "page[extname]",
      },
    },
  },
});

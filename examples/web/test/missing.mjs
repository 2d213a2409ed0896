// Open the page where its model or its library is missing, and print what it says: node test/missing.mjs ADDRESS CHROMIUM
import { chromium } from 'playwright-core';

const [address, executablePath] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox'] });
const page = await browser.newPage();
await page.goto(address);
await page.waitForFunction(() => document.body.dataset.state === 'failed', null, { timeout: 60_000 });
console.log(await page.textContent('#message'));
await browser.close();
